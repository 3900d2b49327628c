// See mkl.py. The whole process sees both names.

static int asked = 0;

// The question by which MKL chooses its code: whether the processor is Intel's.
extern "C" int mkl_serv_intel_cpu_true() {
    asked = 1;
    return 1;
}

// Whether it was asked.
extern "C" int pgrl_mkl_asked() { return asked; }
