// The links of a graph's keys in few bytes.
#pragma once
#include <cstdint>

namespace rag {

// Row i of a graph's links takes `slots` places, in one of three layouts, by the number of segments of 65,536 ids:
//   0: int32 ids, -1 pads at the end;
//   1: uint16 ids, 65,535 pads at the end, for up to 65,535 keys;
//   S: uint16; the first (S + 1) / 2 places hold a byte a segment, how many links lead into it, the rest the low halves
//      of the ids, segment after segment.
struct Links {
    const void* data;
    int64_t slots;
    int64_t segments;

    int64_t row_bytes() const { return slots * (segments ? 2 : 4); }
    const char* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
    void prefetch(int64_t i) const {
        for (int64_t at = 0; at < row_bytes(); at += 64) __builtin_prefetch(row(i) + at);
    }
    // Calls visit(id) for every link of row i.
    template <class Visit>
    void each(int64_t i, Visit&& visit) const {
        if (segments == 0) {
            const auto* ids = reinterpret_cast<const int32_t*>(row(i));
            for (int64_t j = 0; j < slots && ids[j] >= 0; ++j) visit(ids[j]);
            return;
        }
        const auto* ids = reinterpret_cast<const uint16_t*>(row(i));
        if (segments == 1) {
            for (int64_t j = 0; j < slots && ids[j] != 0xffff; ++j) visit(static_cast<int32_t>(ids[j]));
            return;
        }
        const auto* counts = reinterpret_cast<const uint8_t*>(row(i));
        ids += (segments + 1) / 2;
        for (int64_t s = 0; s < segments; ++s)
            for (const uint16_t* end = ids + counts[s]; ids < end; ++ids) visit(static_cast<int32_t>(s << 16 | *ids));
    }
};

// Writes rows of at most `width` int32 ids [rows, width], -1 pads at the end, as uint16 [rows, slots] of `segments` >= 1.
// From 2 on, width is at most 255 and slots less the places of the counts.
void pack_links(const int32_t* ids, int64_t rows, int64_t width, int64_t segments, int64_t slots, uint16_t* out);

// Writes row i of links of any layout: at most `width` int32 ids, -1 pads at the end.
void write_row(const Links& links, int64_t i, const int32_t* ids, int64_t width);

// The other way: links of any layout as int32 [rows, links.slots], -1 pads at the end.
void unpack_links(const Links& links, int64_t rows, int32_t* out);

}  // namespace rag
