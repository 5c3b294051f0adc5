"""What mini_tfm costs, by commit. How to run it: ../README.md.

    common.py     what the others share: inputs, errors, times, two libraries in interleaved pairs, each in its process
    machine.py    what the machine itself can do: sgemm, reading and copying memory; what it is
    kernels.py    products, search, softmax, norms, cross-entropy, positions, AdamW
    attention.py  attention, forward and backward; its peak memory at 16,384 tokens
    model.py      encode, generate, a training step
    steps.py      a decoded token, a small training step, the loss of a large vocabulary
    training.py   a training step of three sizes and of a recurrent memory, beside PyTorch
    characters.py the loss that a character model reaches on real text, here and in PyTorch
    inference.py  whole models at work, beside Transformers, CTranslate2, ONNX Runtime, llama.cpp and others
    accuracy.py   what narrower weights and a narrower cache cost on trained models
    files.py      models as files, in every library's format, and texts
    tape.py       what the tape costs an operation
    segments.py   backpropagation through many segments, kept and computed again: time and peak memory
    memory.py     each memory: reading a stream, training through segments
    parallel.py   training on two processes over MPI
    start.py      import and the first command

`time_*` is seconds, `peakmem_*` the process's peak RAM, `track_*` a number with its unit. Beside each time stands a
`track_error_*`: the distance from a computation in float64. `library` says who computes; one that is not installed is left
out. `track_ratio_<peer>` is the peer's time over ours, above 1 is faster than the peer. What has to be there before the
clock runs is made in `setup`, where it also runs once.
"""
