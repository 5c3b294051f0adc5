# Instruction sets, threads, and what computes


cdef extern from "core.h" nogil:
    struct mt_kernels_table "mt_kernels":
        const char *isa

    const mt_kernels_table *mt_kernels(int is_double)
    int mt_choose_isa(const char *name)
    const char *mt_isa_name(int i, int built)
    int mt_is_emulated(const char *name)


cdef extern from "threads.h" nogil:
    int mt_has_openmp()
    void mt_set_threads(int n, int honour_limit)
    int mt_get_threads()
    void mt_after_fork()
    void mt_watch_signals(int (*check)() noexcept nogil, unsigned long thread)


cdef extern from *:
    """
    /* What a handler raises waits in the thread's state until the kernel has returned. */
    static int mt_run_handlers(void) {
        PyGILState_STATE state = PyGILState_Ensure();
        int raised = PyErr_CheckSignals();
        PyGILState_Release(state);
        return raised;
    }
    """
    int mt_run_handlers() noexcept nogil


cdef extern from *:
    """
    #if defined(__clang__)
    #define MT_COMPILER "clang " __clang_version__
    #else
    #define MT_COMPILER "gcc " __VERSION__
    #endif
    """
    const char *MT_COMPILER


def set_num_threads(n):
    """From now on kernels use up to n threads."""
    mt_set_threads(_checks.thread_count(n), False)


def get_num_threads():
    """How many threads the next kernel may use: 1 in a forked child and in a build without OpenMP."""
    return mt_get_threads()


def _set_default_threads(int n):
    """As set_num_threads, but threadpoolctl's limit on OpenMP still holds."""
    mt_set_threads(n, True)


def _after_fork():
    mt_after_fork()
    _watch_signals(threading.get_ident())


def _watch_signals(unsigned long main_thread):
    """Kernels that can run long run Python's signal handlers now and then, when they are called from this thread."""
    mt_watch_signals(mt_run_handlers, main_thread)


def _choose_isa(name):
    """Chooses an instruction set by name, or the best that runs here (None). False: there is no such one here."""
    if name is None:
        return mt_choose_isa(NULL) == 0
    encoded = name.encode()
    return mt_choose_isa(encoded) == 0


_choose_isa(None)  # so that there are kernels from the start


cdef list isa_names(bint built):
    names = []
    while mt_isa_name(len(names), built) != NULL:
        names.append(mt_isa_name(len(names), built).decode())
    return names


def show_config():
    """What computes: the instruction set in use, those that run here, those built in, OpenMP, threads, compiler."""
    return {
        "isa": mt_kernels(0).isa.decode(),
        "isas": isa_names(False),
        "isas_built": isa_names(True),
        "emulated": [name for name in isa_names(False) if mt_is_emulated(name.encode())],
        "openmp": bool(mt_has_openmp()),
        "num_threads": mt_get_threads(),
        "compiler": MT_COMPILER.decode(),
    }
