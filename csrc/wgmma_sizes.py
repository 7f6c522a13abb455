"""Writes csrc/wgmma_sizes.h, one specialisation of Wgmma<N> a size: python csrc/wgmma_sizes.py > csrc/wgmma_sizes.h"""

SIZES = (8, 16, 32, 48, 56, 64, 72, 80, 96, 112, 128)        # widths N of the right operand that the kernels use
INSTRUCTION = "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16"

HEADER = """// Written by csrc/wgmma_sizes.py. D += A B on the tensor cores, M = 64, K = 16, a specialisation a width N.
// rs: A in registers, B in shared memory (Trans = 1: N contiguous).
// ss: both in shared memory (TransA = 1: M contiguous). `add` = 0 overwrites D.
#pragma once
#include <cstdint>

namespace taylor {
template <int N> struct Wgmma;
"""


def specialisation(n: int) -> str:
    """`Wgmma<n>`: operands of the inline assembly are numbered, accumulators first."""
    r = n // 2
    accumulators = ",".join(f"%{i}" for i in range(r))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(r))
    instruction = INSTRUCTION.format(n=n)
    return f'''
template <> struct Wgmma<{n}> {{
    template <int Trans>
    static __device__ __forceinline__ void rs(float (&d)[{r}], const uint32_t (&a)[4], uint64_t b, int add) {{
        asm volatile("{{.reg .pred p; setp.ne.b32 p, %{r + 5}, 0; {instruction} "
                     "{{{accumulators}}}, {{%{r},%{r + 1},%{r + 2},%{r + 3}}}, %{r + 4}, p, 1, 1, %{r + 6};}}"
                     : {outputs}
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(Trans));
    }}
    template <int TransA = 0, int TransB = 0>
    static __device__ __forceinline__ void ss(float (&d)[{r}], uint64_t a, uint64_t b, int add) {{
        asm volatile("{{.reg .pred p; setp.ne.b32 p, %{r + 2}, 0; {instruction} "
                     "{{{accumulators}}}, %{r}, %{r + 1}, p, 1, 1, %{r + 3}, %{r + 4};}}"
                     : {outputs}
                     : "l"(a), "l"(b), "r"(add), "n"(TransA), "n"(TransB));
    }}
}};'''


if __name__ == "__main__":
    print(HEADER + "\n".join(specialisation(n) for n in SIZES) + "\n}  // namespace taylor")
