// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The container: digests, header, and the places of the tensors. Part of emaudit/standalone.hpp.
#ifndef EMAUDIT_STANDALONE_CONTAINER_HPP
#define EMAUDIT_STANDALONE_CONTAINER_HPP

#include "json.hpp"
#include "types.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace emaudit::standalone::detail {

class Sha256 {
 public:
  void update(const unsigned char *data, std::size_t size) noexcept {
    for (; size > 0; ++data, --size) {
      block_[length_++ % 64] = *data;
      if (length_ % 64 == 0) compress();
    }
  }

  Digest finish() noexcept {
    const std::uint64_t bits = length_ * 8;
    const unsigned char one = 0x80, zero = 0;
    update(&one, 1);
    while (length_ % 64 != 56) update(&zero, 1);
    for (int shift = 56; shift >= 0; shift -= 8) {
      const auto byte = static_cast<unsigned char>(bits >> shift & 0xff);
      update(&byte, 1);
    }
    Digest digest{};
    for (std::size_t i = 0; i < 32; ++i) {
      digest[i] = static_cast<std::uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)) & 0xff);
    }
    return digest;
  }

 private:
  static std::uint32_t rotate(std::uint32_t x, int n) noexcept { return x >> n | x << (32 - n); }

  void compress() noexcept {
    static constexpr std::uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    std::uint32_t w[64];
    for (std::size_t i = 0; i < 16; ++i) {
      w[i] = 0;
      for (std::size_t j = 0; j < 4; ++j) w[i] = w[i] << 8 | block_[4 * i + j];
    }
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    std::array<std::uint32_t, 8> s = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t sum1 = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25);
      const std::uint32_t sum0 = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
      const std::uint32_t t1 = s[7] + sum1 + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
      const std::uint32_t t2 = sum0 + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
    }
    for (std::size_t i = 0; i < 8; ++i) state_[i] += s[i];
  }

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char block_[64] = {};
  std::uint64_t length_ = 0;
};

/// SHA-256 of a file with the 64 characters at `zeros`, where there are so many, read as `0`.
inline Digest sha256(const unsigned char *bytes, std::size_t size, std::size_t zeros) noexcept {
  Sha256 hash;
  hash.update(bytes, zeros);
  for (std::size_t i = zeros; i < std::min(zeros + 64, size); ++i) {
    const unsigned char zero = '0';
    hash.update(&zero, 1);
  }
  if (zeros + 64 < size) hash.update(bytes + zeros + 64, size - zeros - 64);
  return hash.finish();
}

inline std::string hex(const Digest &digest) {
  std::string text;
  for (std::uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

inline bool is_digest(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

struct Tensor {
  std::uint64_t begin = 0, end = 0;
  std::uint32_t layer = 0;
  bool is_mean = false;
};

/// A file whose container was checked; the offsets count from the start of the data.
struct Container {
  std::string manifest, stated;
  std::size_t stated_at = 0, data_start = 0;
  std::vector<Tensor> tensors;
};

/// `layer.N.direction` or `layer.N.aligned_mean` with one spelling per layer.
inline bool read_name(std::string_view name, Tensor &tensor) {
  if (name.substr(0, 6) != "layer.") return false;
  name.remove_prefix(6);
  const std::string_view digits = name.substr(0, name.find('.')), part = name.substr(digits.size());
  const auto layer = integer_of(digits, 0xffffffff);
  if (!layer || (digits[0] == '0' && digits.size() > 1)) return false;
  tensor.layer = static_cast<std::uint32_t>(*layer);
  tensor.is_mean = part == ".aligned_mean";
  return tensor.is_mean || part == ".direction";
}

/// The header's shape: metadata of strings, tensors with their three keys; meaning is checked later.
struct Entry {
  std::string name, dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0, end = 0;
};

inline bool read_entry(Json value, Entry &entry) {
  const Object object = is(value, '{') ? members(value) : Object{};
  const auto dtype = text_of(member(object, "dtype"));
  const Json shape = member(object, "shape"), offsets = member(object, "data_offsets");
  if (object.size() != 3 || !dtype || !is(shape, '[') || !is(offsets, '[')) return false;
  entry.dtype = *dtype;
  for (Json item : values(shape)) {
    const auto size = integer_of(item, UINT64_MAX);
    if (!size) return false;
    entry.shape.push_back(*size);
  }
  const std::vector<Json> both = values(offsets);
  const auto begin = both.size() == 2 ? integer_of(both[0], UINT64_MAX) : std::nullopt;
  const auto end = both.size() == 2 ? integer_of(both[1], UINT64_MAX) : std::nullopt;
  entry.begin = begin.value_or(0);
  entry.end = end.value_or(0);
  return begin && end;
}

inline Error malformed(std::string sentence) { return {Status::malformed, "malformed direction file: " + sentence}; }

inline Error truncated(std::uint64_t needed, std::uint64_t found) {
  return {Status::truncated, "truncated direction file: " + std::to_string(needed) + " bytes are needed, " +
                                 std::to_string(found) + " are there; copy the file again"};
}

inline Error check_version(const std::optional<std::string> &format, const std::optional<std::string> &required) {
  if (!format) return {Status::not_a_direction_file, "not an emaudit direction file: there is no `emaudit.format`"};
  if (*format != "1") return {Status::unsupported_version, "the format version is unknown; use a newer emaudit"};
  if (!required) return malformed("the metadata has no `emaudit.requires`");
  if (required->find_first_not_of(" ,") == std::string::npos) return {};
  return {Status::unsupported_version, "the file requires a feature that is unknown; use a newer emaudit"};
}

/// Each tensor by itself, then that together they fill the data without hole or overlap.
inline Error check_tensors(const std::vector<Entry> &entries, std::uint64_t start, std::uint64_t size, Container &out) {
  for (const Entry &entry : entries) {
    Tensor tensor{entry.begin, entry.end};
    if (!read_name(entry.name, tensor)) return malformed("a tensor is neither `direction` nor `aligned_mean` of a layer");
    const bool holds = entry.dtype == "F32" && entry.shape.size() == 1 && entry.shape[0] >= 1 &&
                       entry.shape[0] <= UINT64_MAX / 4 && entry.begin <= entry.end &&
                       entry.end - entry.begin == 4 * entry.shape[0];
    if (!holds) return malformed("tensor " + entry.name + " is not one dimension of F32 with the extent it states");
    out.tensors.push_back(tensor);
  }
  const auto place = [](const Tensor &t) { return std::pair(t.begin, t.end); };
  std::sort(out.tensors.begin(), out.tensors.end(), [&](auto &a, auto &b) { return place(a) < place(b); });
  std::uint64_t filled = 0;
  for (const Tensor &tensor : out.tensors) {
    if (tensor.begin != filled) return malformed("two tensors overlap or leave a hole");
    if (tensor.end > size) return truncated(start + std::min(tensor.end, UINT64_MAX - start), start + size);
    filled = tensor.end;
  }
  if (filled != size) return malformed("bytes follow the last tensor");
  std::sort(out.tensors.begin(), out.tensors.end(), [](auto &a, auto &b) {
    return std::pair(a.layer, a.is_mean) < std::pair(b.layer, b.is_mean);
  });
  for (std::size_t i = 0; i < out.tensors.size(); i += 2) {
    if (i + 1 == out.tensors.size() || out.tensors[i].layer != out.tensors[i + 1].layer) {
      return malformed("layer " + std::to_string(out.tensors[i].layer) + " lacks one of its two tensors");
    }
  }
  return {};
}

inline Error check_size(std::uint64_t size) {
  if (size > 0 && size <= 1u << 30) return {};
  return {Status::not_a_direction_file, "not an emaudit direction file: it is empty or larger than 2^30 bytes"};
}

/// Reads everything but the values of the tensors and the meaning of the manifest.
inline Error read_container(const unsigned char *bytes, std::size_t size, Container &out) {
  if (Error error = check_size(size)) return error;
  if (size > 8 && bytes[8] != '{') return {Status::not_a_direction_file, "not an emaudit direction file: no header"};
  if (size < 8) return truncated(8, size);
  std::uint64_t length = 0;
  for (std::size_t i = 8; i-- > 0;) length = length << 8 | bytes[i];
  if (length > 1u << 24) return malformed("the header is larger than 2^24 bytes");
  if (length > size - 8) return truncated(8 + length, size);
  const std::string_view header(reinterpret_cast<const char *>(bytes) + 8, static_cast<std::size_t>(length));
  if (!is_utf8(header)) return malformed("the header is not UTF-8");
  if (std::string wrong = JsonChecker(header).check(); !wrong.empty()) return malformed("the header: " + wrong);
  Object metadata;
  std::vector<Entry> entries;
  for (auto &[name, value] : members(header)) {
    if (name == "__metadata__") {
      if (!is(value, '{')) return malformed("`__metadata__` is not an object");
      metadata = members(value);
      for (const auto &[key, text] : metadata) {
        if (!is(text, '"')) return malformed("a value of `__metadata__` is not a string");
      }
      continue;
    }
    Entry entry;
    entry.name = name;
    if (!read_entry(value, entry)) return malformed("the entry of a tensor is not one of safetensors");
    entries.push_back(std::move(entry));
  }
  const auto meta = [&](std::string_view key) { return text_of(member(metadata, key)); };
  if (Error error = check_version(meta("emaudit.format"), meta("emaudit.requires"))) return error;
  out.data_start = 8 + header.size();
  if (out.data_start % 64 != 0) return malformed("the data does not start at a multiple of 64");
  if (Error error = check_tensors(entries, out.data_start, size - out.data_start, out)) return error;
  const std::string_view key = "\"emaudit.content_sha256\":\"";
  const std::size_t at = header.find(key);
  out.stated = meta("emaudit.content_sha256").value_or("");
  const bool once = at != header.npos && header.find(key, at + 1) == header.npos;
  if (!is_digest(out.stated) || !once || header.substr(at + key.size(), 64) != out.stated) {
    return malformed("`emaudit.content_sha256` is not there once as 64 lower-case hex characters without escapes");
  }
  out.stated_at = 8 + at + key.size();
  auto manifest = meta("emaudit.manifest");
  if (!manifest) return malformed("the metadata has no `emaudit.manifest`");
  out.manifest = std::move(*manifest);
  return {};
}

}  // namespace emaudit::standalone::detail

#endif  // EMAUDIT_STANDALONE_CONTAINER_HPP
