// One round of a recursion: a unit of one to three convolutions on windows of maps, three of
// DRAGN's, two of HAMIL's.
//
// Compiled at first use for this processor (see library.py). REAL is float or double, KERNEL the
// side of the square kernel, INPUTS the number of a window's maps, and of a unit's hidden maps.
//
// Lanes are feature channels. A vector holds one pixel of LANES channels of one map; a block is
// LANES channels. Arrays, in vectors:
//   maps      [block][row][pixel]            pixels row by row, h * w of them
//   hidden    [block][window][IN][pixel]     results of a hidden convolution, before BN and ReLU
//   weights   [block or 1][input][ky][kx][output], then [output] biases
//   tables    [block][group][values][IN]     of BN; one group, or one for each window
// Where all channels share a kernel, the lanes of its weights are equal and the stride between
// blocks is 0; where each channel has its own, they differ. The code is the same for both. Lanes
// beyond the last channel are computed from zeros; the caller leaves them out of every sum.
//
// A block is one task of one thread, so sums do not depend on the number of threads.

#include <cstdint>
#include <cstdlib>
#include <cstring>

// WIDEST: pixels of a row at once. Their sums for all outputs and one weight fill the registers of
// each instruction set.
#if defined(__AVX512F__)
#define BYTES 64
#define WIDEST 8
#elif defined(__AVX__)
#define BYTES 32
#define WIDEST (INPUTS == 2 ? 7 : 5)
#else
#define BYTES 16
#define WIDEST 4
#endif
typedef REAL V __attribute__((vector_size(BYTES)));
constexpr int LANES = BYTES / sizeof(REAL), K = KERNEL, P = K / 2, KK = K * K, IN = INPUTS;
constexpr int64_t FLUSH = 16;  // windows whose weight gradients are summed in REAL before double

struct Layer {
    const V* weights;     // [IN][K][K][outputs], [outputs]
    const V* transposed;  // [outputs][K][K][IN]: the same, flipped, for gradients of inputs
    double* gradients;    // [block][IN * KK * outputs + outputs][LANES], added to
    int64_t stride;       // vectors of weights between blocks, 0 where all share
    int64_t outputs;      // IN, or 1 for the last
};

// The same fields in the same order as `Job` in kernels.py; compiled.py fills them in. Results may
// lie in the array of the maps, behind all rows that are read, and their gradients likewise in that
// of the maps' gradients.
struct Job {
    int64_t next;  // the block to be taken next, by any thread
    int64_t blocks, rows, out_rows, windows, orders, h, w, layers, layer, grouped;
    const int64_t* members;  // (windows, IN) rows of a window's maps
    const V* maps;           // x: the round's maps, `rows` in each block
    V* out;                  // y: a result is the sum of `orders` windows; out_rows in each block
    V* hidden[2];            // z1, z2
    const V* affine[2];      // BN after convolution 1, 2: (z - v0) * v1 + v2; null: none
    V* moments;              // [block][group][2][IN]: mean and sum of squares around it, or null
    const V* grad_out;       // dy, out_rows in each block
    V* grad_maps;            // dx, added to
    V* grad_hidden[2];       // gradients of BN's results, that is of the ReLU's input
    const V* backward[2];    // dz = v0 * gradient + v1 * (z - v2) + v3; null: dz = gradient
    V* sums;                 // [block][group][2][IN]: sums of gradient, of gradient * (z - mean)
    Layer layer_of[3];
};

struct Scratch {
    V* memory;
    V *input, *grad, *hidden, *weights;
    int64_t padded, pixels, width;
    Scratch(const Job& job) {
        width = job.w + 2 * P;
        padded = (job.h + 2 * P) * width;
        pixels = job.h * job.w;
        const int64_t sums = IN * KK * IN + IN;
        const int64_t count = 2 * IN * padded + 3 * IN * pixels + 3 * sums;
        memory = static_cast<V*>(aligned_alloc(64, (count * sizeof(V) + 63) / 64 * 64));
        memset(static_cast<void*>(memory), 0, count * sizeof(V));
        input = memory, grad = input + IN * padded;
        hidden = grad + IN * padded, weights = hidden + 3 * IN * pixels;
    }
    ~Scratch() { free(memory); }
};

// The inputs of a layer for one window.
struct Maps {
    const V* of[IN];
};

static inline Maps side_by_side(const V* maps, const Scratch& s) {
    Maps found;
    for (int i = 0; i < IN; ++i) found.of[i] = maps + i * s.pixels;
    return found;
}

static inline Maps members(const V* maps, const Job& job, int64_t window, const Scratch& s) {
    Maps found;
    for (int i = 0; i < IN; ++i) found.of[i] = maps + job.members[window * IN + i] * s.pixels;
    return found;
}

static inline V relu(V v) { return v < 0 ? V{} : v; }  // keeps NaN

// --- loops over one window -------------------------------------------------------------------

template <int I, int O, int X>
static inline void convolve_piece(
    const V* in, int64_t padded, int64_t width, const V* weights, V (&sum)[O][X]) {
    for (int i = 0; i < I; ++i)
        for (int ky = 0; ky < K; ++ky, weights += K * O) {
            const V* row = in + i * padded + ky * width;
#pragma GCC unroll 8
            for (int kx = 0; kx < K; ++kx)
#pragma GCC unroll 8
                for (int o = 0; o < O; ++o) {
                    const V weight = weights[kx * O + o];
#pragma GCC unroll 8
                    for (int x = 0; x < X; ++x) sum[o][x] += weight * row[kx + x];
                }
        }
}

template <int I, int O, int X>
static inline void convolve_at(
    const V* in, const Scratch& s, const V* weights, const V* bias, bool add, V* out) {
    V sum[O][X];
    for (int o = 0; o < O; ++o)
        for (int x = 0; x < X; ++x) sum[o][x] = bias ? bias[o] : V{};
    convolve_piece<I, O, X>(in, s.padded, s.width, weights, sum);
    for (int o = 0; o < O; ++o)
        for (int x = 0; x < X; ++x) {
            V* to = out + o * s.pixels + x;
            *to = add ? *to + sum[o][x] : sum[o][x];
        }
}

// I padded maps -> O maps, written to `out` or added to it. A row is cut into pieces of about equal
// width, so that no piece leaves most of the registers unused.
template <int I, int O>
static void convolve(const V* in, const Scratch& s, const Job& job, const V* weights,
                     const V* bias, bool add, V* out) {
    const int64_t pieces = (job.w + WIDEST - 1) / WIDEST;
    for (int64_t y = 0; y < job.h; ++y)
        for (int64_t piece = 0, x = 0; piece < pieces; ++piece) {
            const int64_t wide = (job.w - x + pieces - piece - 1) / (pieces - piece);
            const V* from = in + y * s.width + x;
            V* to = out + y * job.w + x;
            switch (wide) {
                case 1: convolve_at<I, O, 1>(from, s, weights, bias, add, to); break;
                case 2: convolve_at<I, O, 2>(from, s, weights, bias, add, to); break;
                case 3: convolve_at<I, O, 3>(from, s, weights, bias, add, to); break;
                case 4: convolve_at<I, O, 4>(from, s, weights, bias, add, to); break;
#if WIDEST >= 5
                case 5: convolve_at<I, O, 5>(from, s, weights, bias, add, to); break;
#endif
#if WIDEST >= 7
                case 6: convolve_at<I, O, 6>(from, s, weights, bias, add, to); break;
                case 7: convolve_at<I, O, 7>(from, s, weights, bias, add, to); break;
#endif
#if WIDEST >= 8
                case 8: convolve_at<I, O, 8>(from, s, weights, bias, add, to); break;
#endif
            }
            x += wide;
        }
}

// Gradients of weights and biases from one window, sums over pixels, added to `to`.
template <int O>
static void weigh(const V* in, const V* grad, const Scratch& s, const Job& job, V* to) {
    // G inputs at once: enough independent sums to hide the latency of an addition, no more than
    // there are registers.
    constexpr int G = O == 1 || (IN == 2 && K <= 3) ? IN : 1;
    const V* inside = grad + P * s.width + P;
    for (int i = 0; i < IN; i += G)
        for (int ky = 0; ky < K; ++ky) {
            V sum[G][K][O] = {};
            for (int64_t y = 0; y < job.h; ++y)
                for (int64_t x = 0; x < job.w; ++x) {
                    const V* row = in + i * s.padded + (y + ky) * s.width + x;
#pragma GCC unroll 4
                    for (int o = 0; o < O; ++o) {
                        const V g = inside[o * s.padded + y * s.width + x];
#pragma GCC unroll 4
                        for (int k = 0; k < G; ++k)
#pragma GCC unroll 8
                            for (int kx = 0; kx < K; ++kx)
                                sum[k][kx][o] += g * row[k * s.padded + kx];
                    }
                }
            for (int k = 0; k < G; ++k)
                for (int kx = 0; kx < K; ++kx)
                    for (int o = 0; o < O; ++o)
                        to[(((i + k) * K + ky) * K + kx) * O + o] += sum[k][kx][o];
        }
    for (int o = 0; o < O; ++o) {
        V sum = {};
        for (int64_t y = 0; y < job.h; ++y)
            for (int64_t x = 0; x < job.w; ++x) sum += inside[o * s.padded + y * s.width + x];
        to[IN * KK * O + o] += sum;
    }
}

// --- one layer on one window -----------------------------------------------------------------

static inline const V* group(const V* values, const Job& job, int64_t block, int64_t window,
                             int64_t size) {
    if (!values) return nullptr;
    const int64_t groups = job.grouped ? job.windows : 1;
    return values + (block * groups + (job.grouped ? window : 0)) * size;
}

// The layer's padded input: the window's maps, or BN (if any) and ReLU of the hidden maps.
static void load(const Maps& maps, const V* affine, bool hidden, const Scratch& s,
                 const Job& job) {
    for (int i = 0; i < IN; ++i)
        for (int64_t y = 0; y < job.h; ++y) {
            const V* from = maps.of[i] + y * job.w;
            V* to = s.input + i * s.padded + (y + P) * s.width + P;
            if (!hidden)
                for (int64_t x = 0; x < job.w; ++x) to[x] = from[x];
            else if (!affine)
                for (int64_t x = 0; x < job.w; ++x) to[x] = relu(from[x]);
            else
                for (int64_t x = 0; x < job.w; ++x)
                    to[x] = relu((from[x] - affine[i]) * affine[IN + i] + affine[2 * IN + i]);
        }
}

// One layer on one window. In the last layer all windows of a result but the first are added to it.
static void forward(const Job& job, int layer, int64_t block, int64_t window, const Maps& in,
                    V* out, const Scratch& s) {
    const Layer& l = job.layer_of[layer];
    const V* affine = layer ? group(job.affine[layer - 1], job, block, window, 3 * IN) : nullptr;
    load(in, affine, layer > 0, s, job);
    const V* weights = l.weights + block * l.stride;
    if (l.outputs == IN)
        convolve<IN, IN>(s.input, s, job, weights, weights + IN * IN * KK, false, out);
    else
        convolve<IN, 1>(s.input, s, job, weights, weights + IN * KK, window % job.orders, out);
}

// Mean and sum of squares around it of each hidden map, for every lane, joined with those of the
// `before` windows before it by the update of Chan et al. (1983): sums of squares alone would lose
// digits where the mean is large.
static void measure(const V* hidden, const Scratch& s, int64_t before, V* moments) {
    for (int o = 0; o < IN; ++o) {
        V sum = {}, squares = {};
        for (int64_t p = 0; p < s.pixels; ++p) sum += hidden[o * s.pixels + p];
        const V mean = sum / static_cast<REAL>(s.pixels);
        for (int64_t p = 0; p < s.pixels; ++p) {
            const V off = hidden[o * s.pixels + p] - mean;
            squares += off * off;
        }
        if (before == 0) {
            moments[o] = mean, moments[IN + o] = squares;
            continue;
        }
        const REAL share = REAL(1) / static_cast<REAL>(before + 1);
        const V off = mean - moments[o];
        moments[o] += off * share;
        moments[IN + o] += squares + off * off * (share * static_cast<REAL>(before * s.pixels));
    }
}

// Gradients of one layer on one window. `own`: the layer's results (used for BN behind it only);
// `grad`: the gradient of that BN's results; `below`: is set to the gradient of the layer's input,
// before the ReLU if the layer has one in front.
static void backward(const Job& job, int layer, int64_t block, int64_t window, const Maps& in,
                     const V* own, const V* grad, V* below, V* weights_to, const Scratch& s) {
    const Layer& l = job.layer_of[layer];
    const bool last = layer == job.layers - 1;
    const V* bn = last ? nullptr : group(job.backward[layer], job, block, window, 4 * IN);
    for (int64_t o = 0; o < l.outputs; ++o)
        for (int64_t y = 0; y < job.h; ++y) {
            const int64_t at = o * s.pixels + y * job.w;
            V* to = s.grad + o * s.padded + (y + P) * s.width + P;
            if (!bn)
                for (int64_t x = 0; x < job.w; ++x) to[x] = grad[at + x];
            else
                for (int64_t x = 0; x < job.w; ++x)
                    to[x] = bn[o] * grad[at + x] +
                            bn[IN + o] * (own[at + x] - bn[2 * IN + o]) + bn[3 * IN + o];
        }
    const V* affine = layer ? group(job.affine[layer - 1], job, block, window, 3 * IN) : nullptr;
    load(in, affine, layer > 0, s, job);
    if (l.outputs == IN)
        weigh<IN>(s.input, s.grad, s, job, weights_to);
    else
        weigh<1>(s.input, s.grad, s, job, weights_to);
    if (!below) return;
    const V* transposed = l.transposed + block * l.stride;
    if (l.outputs == IN)
        convolve<IN, IN>(s.grad, s, job, transposed, nullptr, false, below);
    else
        convolve<1, IN>(s.grad, s, job, transposed, nullptr, false, below);
    if (layer == 0) return;
    for (int i = 0; i < IN; ++i)
        for (int64_t y = 0; y < job.h; ++y) {
            const V* active = s.input + i * s.padded + (y + P) * s.width + P;
            V* to = below + i * s.pixels + y * job.w;
            for (int64_t x = 0; x < job.w; ++x) to[x] = active[x] > 0 ? to[x] : V{};
        }
}

// Adds a window's gradients (IN maps side by side) to those of its member maps. Windows share
// members, so this is done window by window in the one thread of the block.
static void pass_down(const Job& job, int64_t window, const V* below, V* grad_maps,
                      const Scratch& s) {
    for (int i = 0; i < IN; ++i) {
        V* to = grad_maps + job.members[window * IN + i] * s.pixels;
        for (int64_t p = 0; p < s.pixels; ++p) to[p] += below[i * s.pixels + p];
    }
}

// --- sums over windows -------------------------------------------------------------------------

// Adds the sums of some windows to the gradients in double, and sets them to 0. In REAL alone, a
// sum over thousands of windows would lose digits.
static void flush(const Job& job, int layer, int64_t block, V* sums) {
    const Layer& l = job.layer_of[layer];
    const int64_t count = IN * KK * l.outputs + l.outputs;
    double* to = l.gradients + block * count * LANES;
    for (int64_t j = 0; j < count; ++j)
        for (int lane = 0; lane < LANES; ++lane) to[j * LANES + lane] += sums[j][lane];
    memset(static_cast<void*>(sums), 0, count * sizeof(V));
}

static inline V* sums_of(const Scratch& s, int layer) {
    return s.weights + layer * (IN * IN * KK + IN);
}

// Takes blocks one after the other until there are no more; every thread runs this.
template <class Task>
static void blocks(Job* job, Task task) {
    Scratch scratch(*job);
    for (;;) {
        const int64_t block = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (block >= job->blocks) return;
        task(block, scratch);
    }
}

// --- called from Python ------------------------------------------------------------------------

extern "C" {

int64_t lanes() { return LANES; }

// A whole unit, window by window, so that hidden maps stay in the cache.
void fold(Job* job) {
    blocks(job, [job](int64_t block, const Scratch& s) {
        const V* maps = job->maps + block * job->rows * s.pixels;
        V* out = job->out + block * job->out_rows * s.pixels;
        for (int64_t window = 0; window < job->windows; ++window) {
            Maps in = members(maps, *job, window, s);
            for (int layer = 0; layer < job->layers; ++layer) {
                const bool last = layer == job->layers - 1;
                V* to = last ? out + window / job->orders * s.pixels
                             : s.hidden + layer * IN * s.pixels;
                forward(*job, layer, block, window, in, to, s);
                if (!last) in = side_by_side(to, s);
            }
        }
    });
}

// The gradients of `fold`; hidden maps are computed again.
void fold_backward(Job* job) {
    blocks(job, [job](int64_t block, const Scratch& s) {
        const V* maps = job->maps + block * job->rows * s.pixels;
        const V* grad_out = job->grad_out + block * job->out_rows * s.pixels;
        V* grad_maps = job->grad_maps ? job->grad_maps + block * job->rows * s.pixels : nullptr;
        V* below = s.hidden + 2 * IN * s.pixels;
        for (int64_t window = 0; window < job->windows; ++window) {
            Maps in[3] = {members(maps, *job, window, s)};  // of each layer
            for (int layer = 0; layer + 1 < job->layers; ++layer) {
                V* to = s.hidden + layer * IN * s.pixels;
                forward(*job, layer, block, window, in[layer], to, s);
                in[layer + 1] = side_by_side(to, s);
            }
            const V* grad = grad_out + window / job->orders * s.pixels;
            for (int layer = job->layers - 1; layer >= 0; --layer) {
                V* to = layer || grad_maps ? below : nullptr;
                backward(*job, layer, block, window, in[layer], nullptr, grad, to,
                         sums_of(s, layer), s);
                grad = below;
                if (window % FLUSH == FLUSH - 1 || window == job->windows - 1)
                    flush(*job, layer, block, sums_of(s, layer));
            }
            if (grad_maps) pass_down(*job, window, below, grad_maps, s);
        }
    });
}

// One convolution on all windows: BN needs the statistics of all before the next convolution.
void layer(Job* job) {
    blocks(job, [job](int64_t block, const Scratch& s) {
        const int layer = job->layer;
        const bool last = layer == job->layers - 1;
        const V* maps = job->maps + block * job->rows * s.pixels;
        for (int64_t window = 0; window < job->windows; ++window) {
            const int64_t at = block * job->windows + window;
            const int64_t result = block * job->out_rows + window / job->orders;
            const Maps in = layer ? side_by_side(job->hidden[layer - 1] + at * IN * s.pixels, s)
                                  : members(maps, *job, window, s);
            V* out = last ? job->out + result * s.pixels
                          : job->hidden[layer] + at * IN * s.pixels;
            forward(*job, layer, block, window, in, out, s);
            if (!job->moments) continue;
            measure(out, s, job->grouped ? 0 : window,
                    job->moments + (job->grouped ? at : block) * 2 * IN);
        }
    });
}

// The gradients of `layer`: of its weights and of its input, and the two sums over the latter that
// the gradient of the BN before it needs.
void layer_backward(Job* job) {
    blocks(job, [job](int64_t block, const Scratch& s) {
        const int layer = job->layer;
        const bool last = layer == job->layers - 1;
        const V* maps = job->maps + block * job->rows * s.pixels;
        V* grad_maps = job->grad_maps ? job->grad_maps + block * job->rows * s.pixels : nullptr;
        for (int64_t window = 0; window < job->windows; ++window) {
            const int64_t at = block * job->windows + window;
            const int64_t result = block * job->out_rows + window / job->orders;
            const V* before = layer ? job->hidden[layer - 1] + at * IN * s.pixels : nullptr;
            const Maps in = layer ? side_by_side(before, s) : members(maps, *job, window, s);
            const V* own = last ? nullptr : job->hidden[layer] + at * IN * s.pixels;
            const V* grad = last ? job->grad_out + result * s.pixels
                                 : job->grad_hidden[layer] + at * IN * s.pixels;
            V* below = layer ? job->grad_hidden[layer - 1] + at * IN * s.pixels
                             : (grad_maps ? s.hidden : nullptr);
            backward(*job, layer, block, window, in, own, grad, below, sums_of(s, 0), s);
            if (window % FLUSH == FLUSH - 1 || window == job->windows - 1)
                flush(*job, layer, block, sums_of(s, 0));
            if (!layer) {
                if (grad_maps) pass_down(*job, window, below, grad_maps, s);
                continue;
            }
            const V* affine = group(job->affine[layer - 1], *job, block, window, 3 * IN);
            const bool first = job->grouped || window == 0;
            V* sums = job->sums + (job->grouped ? at : block) * 2 * IN;
            for (int i = 0; i < IN; ++i) {
                V plain = {}, scaled = {};
                for (int64_t p = 0; p < s.pixels; ++p) {
                    const V g = below[i * s.pixels + p];
                    plain += g;
                    scaled += g * (before[i * s.pixels + p] - affine[i]);
                }
                sums[i] = first ? plain : sums[i] + plain;
                sums[IN + i] = first ? scaled : sums[IN + i] + scaled;
            }
        }
    });
}

// (count, channels, pixels) values -> the first `count` maps; lanes beyond the last channel are 0.
// `restore` is the way back.
#define ARRANGE(NAME, FROM)                                                                   \
    void arrange_##NAME(Job* job, const FROM* from, int64_t count, int64_t channels) {        \
        blocks(job, [=](int64_t block, const Scratch& s) {                                    \
            REAL* to = reinterpret_cast<REAL*>(job->out + block * job->out_rows * s.pixels);  \
            const int64_t first = block * LANES;                                              \
            const int64_t some = channels - first < LANES ? channels - first : LANES;         \
            for (int64_t row = 0; row < count; ++row, to += s.pixels * LANES) {               \
                const FROM* source = from + (row * channels + first) * s.pixels;              \
                if (some < LANES) memset(to, 0, s.pixels * sizeof(V));                        \
                for (int64_t lane = 0; lane < some; ++lane)                                   \
                    for (int64_t p = 0; p < s.pixels; ++p)                                    \
                        to[p * LANES + lane] = static_cast<REAL>(source[lane * s.pixels + p]); \
            }                                                                                 \
        });                                                                                   \
    }
ARRANGE(float32, float)
ARRANGE(float64, double)
#if defined(__FLT16_MAX__)
ARRANGE(float16, _Float16)
#endif

void restore(Job* job, REAL* to, int64_t count, int64_t channels) {
    blocks(job, [=](int64_t block, const Scratch& s) {
        const REAL* from =
            reinterpret_cast<const REAL*>(job->maps + block * job->rows * s.pixels);
        const int64_t first = block * LANES;
        const int64_t some = channels - first < LANES ? channels - first : LANES;
        for (int64_t row = 0; row < count; ++row, from += s.pixels * LANES)
            for (int64_t lane = 0; lane < some; ++lane) {
                REAL* target = to + (row * channels + first + lane) * s.pixels;
                for (int64_t p = 0; p < s.pixels; ++p) target[p] = from[p * LANES + lane];
            }
    });
}

}  // extern "C"
