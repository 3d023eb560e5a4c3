// The quantisers of all layers in one call on a CPU: built, loaded and described by at_once_native.py.
//
// Units lie one behind another in blocks of memory; tables of addresses have an entry a layer. Everything is float32.
// Formulas: quant/levels.py and quant/kernels.py; operations are theirs in their order, so levels of whole widths are the
// same to the last bit (compile without contraction). Sums over a unit are in another order, and where torch mixes two
// levels in one rounding, two are made here.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to the nearest whole number, halves to even.
constexpr float ROUNDER = 12582912.0f;
// Weights beyond the outermost level get no gradient; a little room for rounding.
constexpr float ROOM = 1.000001f;
// Sums of so many products in float32, of those sums in float64: some units are a whole tensor.
constexpr int64_t SUMMED = 4096;

struct Grid {
    float step, limit, offset, divisor;
    Grid(const float* steps, const float* limits, const float* offsets, int64_t unit)
        : step(steps[unit]), limit(limits[unit]), offset(offsets[unit]), divisor(step > 0.0f ? step : 1.0f) {}

    // Comparisons are such that what is not a number stays so.
    inline float nearest(float weight) const {
        float level = weight / divisor - offset;
        level = level < -1000.0f ? -1000.0f : level;
        level = level > 1000.0f ? 1000.0f : level;
        level = ((level + ROUNDER) - ROUNDER) + offset;
        level = level < -limit ? -limit : level;
        level = level > limit ? limit : level;
        return level * step;
    }
    float reach() const {
        if (!(step > 0.0f)) return -1.0f;
        return offset > 0.0f ? std::numeric_limits<float>::infinity() : limit * step * ROOM;
    }
    float step_gradient(double along_level, double along_weight) const {
        if (!(step > 0.0f)) return 0.0f;
        return (static_cast<float>(along_level) - (offset > 0.0f ? 0.0f : static_cast<float>(along_weight))) / divisor;
    }
};

inline float between(float low, float high, float share) {
    const float way = high - low;
    return share < 0.5f ? low + share * way : high - way * (1.0f - share);
}

// A thread takes longer to start than so many weights take.
constexpr int64_t WORTH_A_THREAD = 65536;

// Calls work(unit) for all units, on at most as many threads, each with about as many weights.
template <typename Work>
void for_units(int64_t num_units, const int64_t* num_u, int64_t most_threads, const Work& work) {
    int64_t total = 0;
    for (int64_t unit = 0; unit < num_units; ++unit) total += num_u[unit];
    const int64_t num_threads = std::min(most_threads, 1 + total / WORTH_A_THREAD);
    std::vector<std::thread> threads;
    int64_t begin = 0, seen = 0;
    for (int64_t part = 1; part <= num_threads; ++part) {
        int64_t end = begin;
        while (end < num_units && (part == num_threads || seen < total / num_threads * part)) seen += num_u[end++];
        auto run = [=, &work] {
            for (int64_t unit = begin; unit < end; ++unit) work(unit);
        };
        if (part == num_threads) {
            run();
        } else {
            try {
                threads.emplace_back(run);
            } catch (const std::system_error&) {  // the machine gives no more: this one does it
                run();
            }
        }
        begin = end;
    }
    for (auto& thread : threads) thread.join();
}

}  // namespace

extern "C" {

void fqsweep_quantise(
    int64_t num_units, int64_t num_threads, const int64_t* layers, const int64_t* starts, const int64_t* nums,
    const float* const* weights, float* const* outs, const float* steps, const float* limits, const float* offsets
) {
    for_units(num_units, nums, num_threads, [=](int64_t unit) {
        const Grid grid(steps, limits, offsets, unit);
        const float* weight = weights[layers[unit]] + starts[unit];
        float* out = outs[layers[unit]] + starts[unit];
        const int64_t num = nums[unit];
#pragma omp simd
        for (int64_t i = 0; i < num; ++i) out[i] = grid.nearest(weight[i]);
    });
}

void fqsweep_quantise_backward(
    int64_t num_units, int64_t num_threads, const int64_t* layers, const int64_t* starts, const int64_t* nums,
    const float* const* weights, const float* const* grads, float* const* outs,
    const float* steps, const float* limits, const float* offsets, float* grad_steps
) {
    for_units(num_units, nums, num_threads, [=](int64_t unit) {
        const Grid grid(steps, limits, offsets, unit);
        const float reach = grid.reach();
        const float* weight = weights[layers[unit]] + starts[unit];
        const float* grad = grads[layers[unit]] + starts[unit];
        float* out = outs[layers[unit]] + starts[unit];
        const int64_t num = nums[unit];
        double along_level = 0.0, along_weight = 0.0;
        for (int64_t begin = 0; begin < num; begin += SUMMED) {
            const int64_t end = begin + SUMMED < num ? begin + SUMMED : num;
            float level_sum = 0.0f, weight_sum = 0.0f;
#pragma omp simd reduction(+ : level_sum, weight_sum)
            for (int64_t i = begin; i < end; ++i) {
                const float passed = std::fabs(weight[i]) > reach ? 0.0f : grad[i];
                level_sum += grad[i] * grid.nearest(weight[i]);
                weight_sum += passed * weight[i];
                out[i] = passed;
            }
            along_level += level_sum;
            along_weight += weight_sum;
        }
        grad_steps[unit] = grid.step_gradient(along_level, along_weight);
    });
}

void fqsweep_mix(
    int64_t num_units, int64_t num_threads, const int64_t* layers, const int64_t* starts, const int64_t* nums,
    const float* const* weights, float* const* outs, const float* shares,
    const float* low_steps, const float* low_limits, const float* low_offsets,
    const float* high_steps, const float* high_limits, const float* high_offsets
) {
    for_units(num_units, nums, num_threads, [=](int64_t unit) {
        const Grid low(low_steps, low_limits, low_offsets, unit), high(high_steps, high_limits, high_offsets, unit);
        const float share = shares[unit];
        const float* weight = weights[layers[unit]] + starts[unit];
        float* out = outs[layers[unit]] + starts[unit];
        const int64_t num = nums[unit];
#pragma omp simd
        for (int64_t i = 0; i < num; ++i) out[i] = between(low.nearest(weight[i]), high.nearest(weight[i]), share);
    });
}

void fqsweep_mix_backward(
    int64_t num_units, int64_t num_threads, const int64_t* layers, const int64_t* starts, const int64_t* nums,
    const float* const* weights, const float* const* grads, float* const* outs, const float* shares,
    const float* low_steps, const float* low_limits, const float* low_offsets,
    const float* high_steps, const float* high_limits, const float* high_offsets,
    float* grad_shares, float* grad_lows, float* grad_highs
) {
    for_units(num_units, nums, num_threads, [=](int64_t unit) {
        const Grid low(low_steps, low_limits, low_offsets, unit), high(high_steps, high_limits, high_offsets, unit);
        const float low_reach = low.reach(), high_reach = high.reach(), share = shares[unit];
        const float* weight = weights[layers[unit]] + starts[unit];
        const float* grad = grads[layers[unit]] + starts[unit];
        float* out = outs[layers[unit]] + starts[unit];
        const int64_t num = nums[unit];
        double low_level = 0.0, low_weight = 0.0, high_level = 0.0, high_weight = 0.0;
        for (int64_t begin = 0; begin < num; begin += SUMMED) {
            const int64_t end = begin + SUMMED < num ? begin + SUMMED : num;
            float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
            for (int64_t i = begin; i < end; ++i) {
                const float size = std::fabs(weight[i]);
                const float low_passed = size > low_reach ? 0.0f : grad[i];
                const float high_passed = size > high_reach ? 0.0f : grad[i];
                a += grad[i] * low.nearest(weight[i]);
                b += low_passed * weight[i];
                c += grad[i] * high.nearest(weight[i]);
                d += high_passed * weight[i];
                out[i] = between(low_passed, high_passed, share);
            }
            low_level += a;
            low_weight += b;
            high_level += c;
            high_weight += d;
        }
        grad_shares[unit] = static_cast<float>(high_level - low_level);
        grad_lows[unit] = low.step_gradient(low_level, low_weight) * (1.0f - share);
        grad_highs[unit] = high.step_gradient(high_level, high_weight) * share;
    });
}

}  // extern "C"
