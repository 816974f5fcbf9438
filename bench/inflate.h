/* Inflates one raw DEFLATE stream (RFC 1951), so that the load client needs no library. Short rather than fast. */
#include <stddef.h>
#include <string.h>

struct bits {
    const unsigned char *data;
    size_t size, at;
    unsigned held, count;
    int is_short; /* the end was reached before all requested bits */
};

/* A canonical Huffman code: the number of symbols of each length, and the symbols in the order of their codes. */
struct code {
    unsigned short lengths[16], symbols[288];
};

static unsigned take_bits(struct bits *in, unsigned count) {
    unsigned value;
    while (in->count < count) {
        if (in->at == in->size) {
            in->is_short = 1;
            return 0;
        }
        in->held |= (unsigned)in->data[in->at++] << in->count;
        in->count += 8;
    }
    value = in->held & ((1u << count) - 1);
    in->held >>= count;
    in->count -= count;
    return value;
}

static void make_code(struct code *code, const unsigned char *lengths, unsigned count) {
    unsigned short next[16] = {0};
    memset(code->lengths, 0, sizeof code->lengths);
    for (unsigned i = 0; i < count; i++) code->lengths[lengths[i]]++;
    code->lengths[0] = 0;
    for (unsigned i = 1; i < 15; i++) next[i + 1] = (unsigned short)(next[i] + code->lengths[i]);
    for (unsigned i = 0; i < count; i++)
        if (lengths[i]) code->symbols[next[lengths[i]]++] = (unsigned short)i;
}

/* Returns the next symbol, or -1. */
static int take_symbol(struct bits *in, const struct code *code) {
    int value = 0, first = 0, index = 0;
    for (int length = 1; length < 16 && !in->is_short; length++) {
        value |= (int)take_bits(in, 1);
        if (value - code->lengths[length] < first) return code->symbols[index + value - first];
        index += code->lengths[length];
        first = (first + code->lengths[length]) << 1;
        value <<= 1;
    }
    return -1;
}

static int take_codes(struct bits *in, struct code *literals, struct code *distances) {
    static const unsigned char ORDER[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    unsigned char lengths[320] = {0};
    unsigned literal_count = take_bits(in, 5) + 257, distance_count = take_bits(in, 5) + 1, count = take_bits(in, 4) + 4;
    for (unsigned i = 0; i < count; i++) lengths[ORDER[i]] = (unsigned char)take_bits(in, 3);
    make_code(literals, lengths, 19);
    for (unsigned i = 0; i < literal_count + distance_count;) {
        int symbol = take_symbol(in, literals);
        unsigned char value = 0;
        unsigned times = 1;
        if (symbol < 0 || (symbol == 16 && !i)) return -1;
        if (symbol < 16) value = (unsigned char)symbol;
        if (symbol == 16) value = lengths[i - 1], times = 3 + take_bits(in, 2);
        if (symbol == 17) times = 3 + take_bits(in, 3);
        if (symbol == 18) times = 11 + take_bits(in, 7);
        if (i + times > literal_count + distance_count) return -1;
        while (times--) lengths[i++] = value;
    }
    make_code(literals, lengths, literal_count);
    make_code(distances, lengths + literal_count, distance_count);
    return 0;
}

/* Inflates `data` into `out`. Returns the number of bytes, or -1 if it is damaged, truncated or larger than `room`. */
static ptrdiff_t inflate_all(const unsigned char *data, size_t size, unsigned char *out, size_t room) {
    static const unsigned short LENGTH[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                              31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const unsigned char LENGTH_BITS[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    struct bits in = {.data = data, .size = size};
    struct code literals, distances;
    unsigned char lengths[288];
    size_t made = 0;
    int is_last = 0;
    while (!is_last && !(in.at == in.size && !in.count)) {
        unsigned kind;
        is_last = (int)take_bits(&in, 1);
        kind = take_bits(&in, 2);
        if (in.is_short || kind == 3) return -1;
        if (kind == 0) {
            size_t length;
            in.held = in.count = 0;
            if (in.size - in.at < 4) return -1;
            length = (size_t)data[in.at] | (size_t)data[in.at + 1] << 8;
            in.at += 4;
            if (length > in.size - in.at || length > room - made) return -1;
            memcpy(out + made, data + in.at, length);
            in.at += length;
            made += length;
            continue;
        }
        if (kind == 1) {
            for (unsigned i = 0; i < 288; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
            make_code(&literals, lengths, 288);
            memset(lengths, 5, 30);
            make_code(&distances, lengths, 30);
        } else if (take_codes(&in, &literals, &distances)) {
            return -1;
        }
        for (;;) {
            int symbol = take_symbol(&in, &literals);
            size_t length, distance;
            if (symbol < 0 || symbol > 285 || in.is_short) return -1;
            if (symbol == 256) break;
            if (symbol < 256) {
                if (made == room) return -1;
                out[made++] = (unsigned char)symbol;
                continue;
            }
            length = LENGTH[symbol - 257] + take_bits(&in, LENGTH_BITS[symbol - 257]);
            symbol = take_symbol(&in, &distances);
            if (symbol < 0 || symbol > 29) return -1;
            distance = symbol < 2 ? (size_t)symbol + 1
                                  : (((size_t)2 + (symbol & 1)) << (symbol / 2 - 1)) + 1 + take_bits(&in, (unsigned)symbol / 2 - 1);
            if (in.is_short || distance > made || length > room - made) return -1;
            while (length--) out[made] = out[made - distance], made++;
        }
    }
    return in.is_short ? -1 : (ptrdiff_t)made;
}
