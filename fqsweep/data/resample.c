/* Images moved, lit and normalised in one pass over their pixels; see compiled.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a pixel is read as the lower bytes of a word"
#endif

/* A coordinate in pixels, mirrored at the outer edges of the outermost pixels. */
static inline float mirrored(float at, float size) {
    at = fabsf(at + 0.5f);
    at = at > size ? 2.0f * size - at : at;
    at = at < 0.5f ? 0.5f : at;
    return (at > size - 0.5f ? size - 0.5f : at) - 0.5f;
}

/* Three channels and one byte that is not used: a word is gathered faster than three bytes. */
static inline uint32_t word(const uint8_t *pixels, int at) {
    uint32_t value;
    memcpy(&value, pixels + at, sizeof value);
    return value;
}

static float mean_of(const uint8_t *pixels, int count) {
    uint64_t sum = 0;
    for (int i = 0; i < count; i++) sum += pixels[i];
    return (float)((double)sum / count);
}

/* One image (height, width, 3) to (3, height, width), each new pixel a bilinear mix of four old ones:
   min(max(gain * mix + offset, low), high) in each channel. theta maps new coordinates to old ones, from -1 to 1. */
static void resample_one(const uint8_t *restrict pixels, int height, int width, const float *restrict theta,
                         const float *restrict gain, const float *restrict offset, const float *restrict low,
                         const float *restrict high, float *restrict out) {
    const int last_word = 3 * height * width - 4;
    for (int y = 0; y < height; y++) {
        const float y_new = (2.0f * y + 1.0f) / height - 1.0f;
        const float x_row = theta[1] * y_new + theta[2], y_row = theta[4] * y_new + theta[5];
        float *restrict red = out + y * width, *restrict green = red + height * width;
        float *restrict blue = green + height * width;
        for (int x = 0; x < width; x++) {
            const float x_new = (2.0f * x + 1.0f) / width - 1.0f;
            const float x_old = mirrored((theta[0] * x_new + x_row + 1.0f) * (0.5f * width) - 0.5f, width);
            const float y_old = mirrored((theta[3] * x_new + y_row + 1.0f) * (0.5f * height) - 0.5f, height);
            int left = (int)x_old, upper = (int)y_old;
            left = left > width - 2 ? width - 2 : left;
            upper = upper > height - 2 ? height - 2 : upper;
            const float right_share = x_old - left, lower_share = y_old - upper;
            const float share11 = right_share * lower_share, share10 = lower_share - share11;
            const float share01 = right_share - share11, share00 = 1.0f - right_share - share10;
            const int at00 = 3 * (upper * width + left), at10 = at00 + 3 * width;
            /* The last pixel of an image ends with its last byte: its word begins one byte earlier. */
            const int at11 = at10 + 3 > last_word ? last_word : at10 + 3, spare = 8 * (at10 + 3 - at11);
            const uint32_t word00 = word(pixels, at00), word01 = word(pixels, at00 + 3);
            const uint32_t word10 = word(pixels, at10), word11 = word(pixels, at11) >> spare;
#define MIX(channel, line)                                                                                        \
    do {                                                                                                          \
        float value = share00 * (int)((word00 >> (8 * channel)) & 255) +                                          \
                      share01 * (int)((word01 >> (8 * channel)) & 255) +                                          \
                      share10 * (int)((word10 >> (8 * channel)) & 255) +                                          \
                      share11 * (int)((word11 >> (8 * channel)) & 255);                                           \
        value = gain[channel] * value + offset[channel];                                                          \
        value = value < low[channel] ? low[channel] : value;                                                      \
        line[x] = value > high[channel] ? high[channel] : value;                                                  \
    } while (0)
            MIX(0, red);
            MIX(1, green);
            MIX(2, blue);
#undef MIX
        }
    }
}

/* Images (count, height, width, 3), height and width at least 2. A pixel becomes
   (light[0] * mix + light[1] * mean of the image, within 0 to 255) * scale + shift. */
void resample(const uint8_t *pixels, int count, int height, int width, const float *theta, const float *light,
              const float *scale, const float *shift, float *out) {
    const int size = 3 * height * width;
    for (int image = 0; image < count; image++, pixels += size, out += size, theta += 6, light += 2) {
        const float lift = light[1] == 0.0f ? 0.0f : light[1] * mean_of(pixels, size);
        float gain[3], offset[3], high[3];
        for (int channel = 0; channel < 3; channel++) {
            gain[channel] = light[0] * scale[channel];
            offset[channel] = lift * scale[channel] + shift[channel];
            high[channel] = 255.0f * scale[channel] + shift[channel];
        }
        resample_one(pixels, height, width, theta, gain, offset, shift, high, out);
    }
}
