// Actions of a small policy for a few observations: what `sampling.InNumpy` computes, in one call. Built by `native.py`.

#include <cmath>
#include <cstdint>
#include <cstring>

enum Activation : int64_t { TANH, RELU };
enum Kind : int64_t { DISCRETE, GAUSSIAN, SQUASHED, DETERMINISTIC };

struct Layer {
    int64_t inputs, outputs;
    const float *weight, *bias;  // [outputs, inputs] and [outputs]
};

struct Policy {  // as `sampling.POLICY` in Python
    int64_t count;                   // of layers, the head among them
    const Layer *layers;
    Activation activation;
    Kind kind;
    int64_t actions;                 // numbers of an action, or choices
    const float *scale, *shift;      // of observations, which are as they are without
    float clip;                      // normalised observations within +-
    float log_std_init, log_std_low, log_std_high;
    const float *log_std;            // [actions]; null: the head's second half plus log_std_init, within low and high
    const float *center, *radius;    // of the env's units; null: the policy's are the same
    float *scratch, *other_scratch;  // each a row as wide as the widest layer
};
static_assert(sizeof(Layer) == 32 && sizeof(Policy) == 112, "sampling.py packs these without gaps");

// Comparisons are such that NaN stays NaN.
static inline float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// e^x to single precision: 2^n times a polynomial of the rest, which compilers turn into vector instructions.
static inline float exponential(float x) {
    x = within(x, -87.0f, 88.0f);
    float n = std::nearbyint(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 720.0f + r * (1.0f / 5040.0f);
    p = 0.5f + r * (1.0f / 6.0f + r * (1.0f / 24.0f + r * (1.0f / 120.0f + r * p)));
    p = 1.0f + r * (1.0f + r * p);
    int32_t bits = ((x == x ? static_cast<int32_t>(n) : 0) + 127) << 23;  // NaN, which no number stands for, is in p
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float tanh_of(float x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

// Sums are taken side by side, and then in pairs: in an order that the source gives, and vector instructions follow.
constexpr int64_t PARTS = 16;

static inline float total(const float (&x)[PARTS]) {
    float a[8], b[4];
    for (int k = 0; k < 8; k++) a[k] = x[k] + x[k + 8];
    for (int k = 0; k < 4; k++) b[k] = a[k] + a[k + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

static void multiply(const Layer &layer, const float *x, float *y) {
    const int64_t inputs = layer.inputs, whole = inputs - inputs % PARTS;
    for (int64_t o = 0; o < layer.outputs; o++) {
        const float *w = layer.weight + o * inputs;
        float parts[PARTS] = {}, rest = layer.bias[o];
        for (int64_t i = 0; i < whole; i += PARTS)
            for (int64_t k = 0; k < PARTS; k++) parts[k] += w[i + k] * x[i + k];
        for (int64_t i = whole; i < inputs; i++) rest += w[i] * x[i];
        y[o] = rest + total(parts);
    }
}

// The head's output for one observation, in one of the scratch rows.
static float *forward(const Policy &p, const float *obs) {
    float *x = p.scratch, *y = p.other_scratch;
    const int64_t inputs = p.layers[0].inputs;
    std::memcpy(x, obs, inputs * sizeof(float));
    if (p.scale)
        for (int64_t i = 0; i < inputs; i++) x[i] = within(x[i] * p.scale[i] + p.shift[i], -p.clip, p.clip);
    for (int64_t k = 0; k < p.count; k++) {
        const Layer &layer = p.layers[k];
        multiply(layer, x, y);
        if (k < p.count - 1 && p.activation == TANH)
            for (int64_t o = 0; o < layer.outputs; o++) y[o] = tanh_of(y[o]);
        if (k < p.count - 1 && p.activation == RELU)
            for (int64_t o = 0; o < layer.outputs; o++) y[o] = y[o] < 0.0f ? 0.0f : y[o];
        float *other = x;
        x = y, y = other;
    }
    return x;
}

static int64_t choose(const Policy &p, const float *logits, const float *noise) {
    int64_t best = 0;
    for (int64_t i = 1; i < p.actions; i++)
        if (logits[i] + noise[i] > logits[best] + noise[best]) best = i;
    return best;
}

static float deviation(const Policy &p, const float *out, int64_t i) {
    if (p.log_std) return std::exp(p.log_std[i]);
    return std::exp(within(out[p.actions + i] + p.log_std_init, p.log_std_low, p.log_std_high));
}

static void act(const Policy &p, const float *out, const float *noise, float *action) {
    for (int64_t i = 0; i < p.actions; i++) {
        float x;
        if (p.kind == DETERMINISTIC)
            x = within(tanh_of(out[i]) + noise[i], -1.0f, 1.0f);
        else
            x = out[i] + noise[i] * deviation(p, out, i);
        if (p.kind == SQUASHED) x = tanh_of(x);
        action[i] = p.center ? p.center[i] + p.radius[i] * x : x;
    }
}

// obs [rows, inputs], noise [rows, actions], action [rows, actions] of float, or [rows] of int64 where one is chosen.
extern "C" void pgrl_sample(const Policy *p, int64_t rows, const float *obs, const float *noise, void *action) {
    for (int64_t r = 0; r < rows; r++) {
        const float *out = forward(*p, obs + r * p->layers[0].inputs), *own = noise + r * p->actions;
        if (p->kind == DISCRETE)
            static_cast<int64_t *>(action)[r] = choose(*p, out, own);
        else
            act(*p, out, own, static_cast<float *>(action) + r * p->actions);
    }
}
