// Tensor maps: the emulated driver's encoding, and copies of boxes.
//
// The rules are those of cuTensorMapEncodeTiled (CUDA Driver API, "Tensor Map Object Management") without interleaving,
// with element strides of 1 and zeros outside the tensor. A swizzle wants a box whose inner extent is exactly its span;
// the API also takes less, which no kernel here needs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace emulator {

inline constexpr unsigned kTensorMapWords = 16;
inline constexpr unsigned kMaxTensorRank = 5;

struct TensorMapSpec {
    std::uint64_t address;
    std::uint32_t element_bytes, rank;
    std::uint64_t dims[kMaxTensorRank];     // elements, innermost first
    std::uint64_t strides[kMaxTensorRank];  // bytes, of the dimension with the same index; [0] is the element's size
    std::uint32_t box[kMaxTensorRank];      // elements
    std::uint32_t swizzle;                  // span in bytes: 0, 32, 64 or 128
};

// The words of the map, or what is wrong with the specification.
std::optional<std::string> encode_tensor_map(const TensorMapSpec& spec, std::uint64_t (&words)[kTensorMapWords]);

// A map as a kernel passes it; faults when it is none, or a local copy.
struct TensorMapView {
    TensorMapView(const std::uint64_t* words, const char* instruction);
    TensorMapSpec spec;
    std::uint32_t inner_bytes() const { return spec.box[0] * spec.element_bytes; }
    std::uint32_t box_bytes() const;
};

// Loads the box at `at` to a shared address of this block, or of every block of the cluster in the mask `blocks`.
void load_box(const std::uint64_t* words, const std::int32_t* at, unsigned rank, std::uint32_t destination,
              std::uint32_t barrier, std::optional<std::uint16_t> blocks);
void store_box(const std::uint64_t* words, const std::int32_t* at, unsigned rank, std::uint32_t source);

}  // namespace emulator
