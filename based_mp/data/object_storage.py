"""Corpora in an S3-compatible store (s3://bucket/prefix), through boto3 with its usual variables and files.

AWS_ENDPOINT_URL names a store other than Amazon's; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, open it.
"""

from __future__ import annotations

import importlib.util

from based_mp.errors import UserError

PREFIX = "s3://"
# Training reads a few kilobytes at random places; megatron-core's own 256 MiB are for reading in order.
READ_BYTES = 1 << 16


def is_remote(path: str) -> bool:
    return path.startswith(PREFIX)


def read(path: str) -> bytes:
    """The content of an object. Raises UserError, saying how to reach it."""
    return _call(path, "get_object")["Body"].read()


def size(path: str) -> int | None:
    """Bytes of an object; None where there is none."""
    try:
        return _call(path, "head_object")["ContentLength"]
    except FileNotFoundError:
        return None


def _call(path: str, name: str) -> dict:
    if importlib.util.find_spec("boto3") is None:
        raise UserError(f"{path} needs boto3: pip install '.[s3]'")
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError
    bucket, _, key = path.removeprefix(PREFIX).partition("/")
    try:
        return getattr(boto3.client("s3"), name)(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NoSuchBucket"):
            raise FileNotFoundError(path) from error
        raise UserError(f"cannot read {path} ({error}): check the credentials") from error
    except BotoCoreError as error:
        raise UserError(f"cannot read {path} ({error}): check AWS_ENDPOINT_URL, AWS_REGION and the credentials") \
            from error
