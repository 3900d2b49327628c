// See mkl.py. Both names are seen by the whole process.

static int asked = 0;

// MKL's own question of the processor, by which it chooses its code: whether it is an Intel one.
extern "C" int mkl_serv_intel_cpu_true() {
    asked = 1;
    return 1;
}

// Whether it was put.
extern "C" int pgrl_mkl_asked() { return asked; }
