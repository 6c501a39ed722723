"""The safetensors header: bytes in, a table of tensors out, and back.

A file is an unsigned little-endian 64-bit length N, N bytes of JSON, then the tensors' bytes
without a gap. `parse_header` accepts a subset of what the reference library accepts: everything
ambiguous (a name twice, an unknown field, a hole, a shape that overflows) is refused by name.
`encode_header` gives the bytes that the reference library writes for the same tensors, with the
metadata sorted, since the library's own metadata order changes from run to run.

Source: https://github.com/huggingface/safetensors, format section of the README, version 0.8.
"""
