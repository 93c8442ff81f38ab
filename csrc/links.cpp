#include "links.h"

#include <algorithm>

namespace rag {

void pack_links(const int32_t* ids, int64_t rows, int64_t width, int64_t segments, int64_t slots, uint16_t* out) {
    const int64_t head = segments > 1 ? (segments + 1) / 2 : 0;
    for (int64_t i = 0; i < rows; ++i, ids += width, out += slots) {
        std::fill(out, out + head, 0);
        std::fill(out + head, out + slots, 0xffff);
        const int32_t* end = std::find(ids, ids + width, -1);
        uint16_t* to = out + head;
        for (int64_t s = 0; s < segments; ++s) {
            const uint16_t* begin = to;
            for (const int32_t* id = ids; id < end; ++id)
                if (*id >> 16 == s) *to++ = static_cast<uint16_t>(*id);
            if (head) reinterpret_cast<uint8_t*>(out)[s] = static_cast<uint8_t>(to - begin);
        }
    }
}

void write_row(const Links& links, int64_t i, const int32_t* ids, int64_t width) {
    char* row = const_cast<char*>(links.row(i));
    if (links.segments)
        pack_links(ids, 1, width, links.segments, links.slots, reinterpret_cast<uint16_t*>(row));
    else
        std::fill(std::copy_n(ids, width, reinterpret_cast<int32_t*>(row)), reinterpret_cast<int32_t*>(row) + links.slots, -1);
}

void unpack_links(const Links& links, int64_t rows, int32_t* out) {
    for (int64_t i = 0; i < rows; ++i, out += links.slots) {
        int32_t* to = out;
        links.each(i, [&](int32_t id) { *to++ = id; });
        std::fill(to, out + links.slots, -1);
    }
}

}  // namespace rag
