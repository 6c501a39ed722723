"""Merge arithmetic: pure functions on arrays that the caller owns.

The same code runs on numpy arrays and on torch tensors, in place. Arrays are float32. Every
operation is separate and rounded once: fused forms (`torch.add(alpha=)`, `addcmul`, compiled
kernels) skip a rounding on some processors and change bits. Sums over a tensor are taken in a
fixed order, thresholds are exact order statistics, random masks hash the element's index: on one
machine a result depends neither on blocks nor on threads nor on the device. Between machines, whose
arithmetic follows IEEE 754, the same holds with one reservation: `slerp` computes two numbers a
tensor with the host's `acos` and `sin`, on every device, so its bits are the same where the C
libraries give the same two, once rounded to float32. Masks are multiplied with, never selected by,
so that what is not finite stays so and the caller finds it.
"""
