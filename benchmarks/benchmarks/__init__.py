"""What mini_tfm costs, by commit. How to run it: ../README.md.

    common.py     what the others share: inputs, errors, ratios in interleaved pairs
    machine.py    what the machine itself can do: sgemm, reading memory
    kernels.py    softmax, norms, gemm, cross-entropy, positions, search, AdamW
    attention.py  attention, forward and backward; its peak memory at 16,384 tokens
    model.py      encode, generate, a training step
    memory.py     each memory: reading a stream, training through segments
    start.py      import and the first command

`time_*` is seconds, `peakmem_*` the process's peak RAM, `track_*` a number with its unit. Beside each time stands a
`track_error_*`: the distance from a computation in float64. `library` says who computes; "torch" is left out where it is
not installed. What has to be there before the clock runs is made in `setup`, where it also runs once.
"""
