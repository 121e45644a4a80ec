// SPDX-License-Identifier: MIT OR Apache-2.0
//
// JSON as FORMAT.md has it: checked whole, then read in place. Part of emaudit/standalone.hpp.
#ifndef EMAUDIT_STANDALONE_JSON_HPP
#define EMAUDIT_STANDALONE_JSON_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace emaudit::standalone::detail {

inline bool finite(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

inline bool finite(double value) noexcept { return std::fabs(value) <= std::numeric_limits<double>::max(); }

/// The code point at `at`, which moves behind it; -1 where the bytes are not UTF-8.
inline std::int32_t code_point(std::string_view text, std::size_t &at) noexcept {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const std::uint32_t first = byte(at);
  if ((first >= 0x80 && first < 0xc2) || first > 0xf4) return -1;
  const std::size_t more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
  std::uint32_t value = more == 0 ? first : first & (0x3fu >> more);
  for (std::size_t i = 1; i <= more; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return -1;
    value = value << 6 | (byte(at + i) & 0x3f);
  }
  const bool shortest = more < 2 || value >= (more == 2 ? 0x800u : 0x10000u);
  if (!shortest || value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) return -1;
  at += 1 + more;
  return static_cast<std::int32_t>(value);
}

inline bool is_utf8(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    if (code_point(text, at) < 0) return false;
  }
  return true;
}

/// Not blank and without control characters, in UTF-8 that was checked.
inline bool is_printable(std::string_view text) noexcept {
  bool blank = true;
  for (std::size_t at = 0; at < text.size();) {
    const std::int32_t c = code_point(text, at);
    if (c < 0x20 || (c >= 0x7f && c <= 0x9f)) return false;
    const bool white = c == 0x20 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
                       c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
    blank = blank && white;
  }
  return !blank;
}

/// A number of JSON's grammar as the nearest double; infinite where it is too large.
inline double decimal(std::string_view text) {
  // Moved into an exponent, the decimal point cannot be mistaken under any locale.
  const std::size_t e = std::min(text.find_first_of("eE"), text.size()), point = text.find('.');
  std::string digits(text.substr(0, std::min(point, e)));
  long long exponent = 0;
  if (e < text.size()) {
    const bool minus = text[e + 1] == '-';
    for (char c : text.substr(e + 1)) {
      if (c >= '0' && c <= '9') exponent = std::min(exponent * 10 + (c - '0'), 1'000'000'000'000LL);
    }
    exponent = minus ? -exponent : exponent;
  }
  if (point != text.npos) {
    digits += text.substr(point + 1, e - point - 1);
    exponent -= static_cast<long long>(e - point - 1);
  }
  if (digits.find_first_of("123456789") == digits.npos) return digits[0] == '-' ? -0.0 : 0.0;
  exponent = std::clamp(exponent, -100'000'000LL, 100'000'000LL);  // no text has more digits than that
  digits += 'e' + std::to_string(exponent);
  return std::strtod(digits.c_str(), nullptr);
}

/// Checks that a text is JSON as FORMAT.md has it.
class JsonChecker {
 public:
  explicit JsonChecker(std::string_view text) : text_(text) {}

  /// Empty, or what is wrong.
  std::string check() {
    if (text_.empty() || text_[0] != '{') return "it must begin with `{`";
    if (!value(0)) return wrong_ + " at byte " + std::to_string(at_);
    return text_.find_first_not_of(' ', at_) == text_.npos ? "" : "after its closing `}` only spaces may follow";
  }

  /// The text of the string whose opening quote is at `at`, which moves behind the closing one.
  static std::optional<std::string> string(std::string_view text, std::size_t &at) {
    std::string out;
    for (++at; at < text.size(); ++at) {
      const char c = text[at];
      if (c == '"') return ++at, out;
      if (static_cast<unsigned char>(c) < 0x20) return {};
      if (c != '\\') {
        out += c;
        continue;
      }
      const std::size_t kind = std::string_view("\"\\/bfnrt").find(++at < text.size() ? text[at] : '\0');
      if (kind != std::string_view::npos) {
        out += "\"\\/\b\f\n\r\t"[kind];
      } else if (!escape(text, at, out)) {
        return {};
      }
    }
    return {};
  }

 private:
  bool fail(const char *what) {
    wrong_ = what;
    return false;
  }

  char peek() {
    at_ = std::min(text_.find_first_not_of(" \n\r\t", at_), text_.size());
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool take(char c) {
    const bool there = peek() == c;
    at_ += there;
    return there;
  }

  bool value(int levels) {
    const char c = peek();
    if (c == '{' || c == '[') {
      if (levels == 100) return fail("it nests deeper than 100 levels");
      ++at_;
      return c == '{' ? object(levels + 1) : array(levels + 1);
    }
    if (c == '"') return string(text_, at_) ? true : fail("a broken string");
    for (std::string_view word : {"true", "false", "null"}) {
      if (text_.substr(at_, word.size()) == word) return at_ += word.size(), true;
    }
    return number();
  }

  bool object(int levels) {
    std::vector<std::string> keys;
    if (take('}')) return true;
    do {
      if (peek() != '"') return fail("a key must be a string");
      auto key = string(text_, at_);
      if (!key) return fail("a broken key");
      keys.push_back(std::move(*key));
      if (!take(':')) return fail("a `:` is missing");
      if (!value(levels)) return false;
    } while (take(','));
    if (!take('}')) return fail("a `,` or `}` is missing");
    std::sort(keys.begin(), keys.end());
    const bool unique = std::adjacent_find(keys.begin(), keys.end()) == keys.end();
    return unique ? true : fail("a key stands twice in the object that ends");
  }

  bool array(int levels) {
    if (take(']')) return true;
    do {
      if (!value(levels)) return false;
    } while (take(','));
    return take(']') ? true : fail("a `,` or `]` is missing");
  }

  std::size_t digits() {
    const std::size_t end = std::min(text_.find_first_not_of("0123456789", at_), text_.size());
    return end - std::exchange(at_, end);
  }

  bool number() {
    const std::size_t begin = at_;
    const auto now = [&] { return at_ < text_.size() ? text_[at_] : '\0'; };
    at_ += now() == '-';
    const bool zero = now() == '0';
    const std::size_t whole = digits();
    if (whole == 0 || (zero && whole > 1)) return fail("a value is expected");
    if (now() == '.' && (++at_, digits() == 0)) return fail("a digit must follow the point");
    if (now() == 'e' || now() == 'E') {
      ++at_;
      at_ += now() == '+' || now() == '-';
      if (digits() == 0) return fail("a digit must follow the `e`");
    }
    return finite(decimal(text_.substr(begin, at_ - begin))) ? true : fail("a number beyond binary64");
  }

  /// The 16 bits of four hex digits, -1 for others.
  static std::int32_t four(std::string_view text, std::size_t at) {
    std::int32_t unit = 0;
    for (std::size_t i = at; i < at + 4; ++i) {
      const char c = i < text.size() ? text[i] : '\0';
      const std::size_t digit = std::string_view("0123456789abcdefABCDEF").find(c);
      if (digit == std::string_view::npos) return -1;
      unit = unit << 4 | static_cast<std::int32_t>(digit < 16 ? digit : digit - 6);
    }
    return unit;
  }

  /// A `\u` escape with the `u` at `at`, which moves to its last character.
  static bool escape(std::string_view text, std::size_t &at, std::string &out) {
    std::int32_t c = at < text.size() && text[at] == 'u' ? four(text, at + 1) : -1;
    if (c < 0 || (c >= 0xdc00 && c <= 0xdfff)) return false;
    at += 4;
    if (c >= 0xd800 && c <= 0xdbff) {
      const std::int32_t low = text.substr(at + 1, 2) == "\\u" ? four(text, at + 3) : -1;
      if (low < 0xdc00 || low > 0xdfff) return false;
      at += 6;
      c = 0x10000 + ((c - 0xd800) << 10 | (low - 0xdc00));
    }
    const auto add = [&](std::int32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (c < 0x80) return add(c), true;
    if (c >= 0x10000) add(0xf0 | c >> 18), add(0x80 | (c >> 12 & 0x3f));
    else if (c >= 0x800) add(0xe0 | c >> 12);
    add(c >= 0x800 ? 0x80 | (c >> 6 & 0x3f) : 0xc0 | c >> 6);
    return add(0x80 | (c & 0x3f)), true;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  std::string wrong_;
};

/// A value inside a text that JsonChecker accepted, so that nothing can be wrong with its grammar.
using Json = std::string_view;
using Object = std::vector<std::pair<std::string, Json>>;

/// The value at `at`, which moves behind it and behind the comma, colon and white space around it.
inline Json next_value(std::string_view text, std::size_t &at) {
  const std::string_view between = " \n\r\t,:";
  const std::size_t begin = at = std::min(text.find_first_not_of(between, at), text.size());
  for (std::size_t depth = 0; at < text.size();) {
    const char c = text[at];
    if (c == '"') {
      for (++at; text[at] != '"'; ++at) at += text[at] == '\\';
      ++at;
    } else if (c == '{' || c == '[') {
      ++depth, ++at;
    } else if (c == '}' || c == ']') {
      if (depth == 0) break;
      --depth, ++at;
    } else if (between.find(c) != between.npos && depth > 0) {
      ++at;
    } else {
      at = std::min(text.find_first_of(" \n\r\t,:]}", at), text.size());
    }
    if (depth == 0) break;
  }
  const Json value = text.substr(begin, at - begin);
  at = std::min(text.find_first_not_of(between, at), text.size());
  return value;
}

/// The values between the brackets; for an object keys and values by turns.
inline std::vector<Json> values(Json container) {
  std::vector<Json> found;
  for (std::size_t at = 1; at < container.size();) {
    const Json value = next_value(container, at);
    if (value.empty()) break;
    found.push_back(value);
  }
  return found;
}

inline bool is(Json value, char opening) { return !value.empty() && value[0] == opening; }

inline std::optional<std::string> text_of(Json value) {
  std::size_t at = 0;
  return is(value, '"') ? JsonChecker::string(value, at) : std::nullopt;
}

/// Digits alone, up to `largest`.
inline std::optional<std::uint64_t> integer_of(Json value, std::uint64_t largest) {
  std::uint64_t number = 0;
  if (value.empty() || value.find_first_not_of("0123456789") != value.npos) return {};
  for (char c : value) {
    const auto digit = static_cast<std::uint64_t>(c - '0');
    if (number > (largest - digit) / 10) return {};
    number = number * 10 + digit;
  }
  return number;
}

inline Object members(Json object) {
  Object found;
  const std::vector<Json> parts = values(object);
  for (std::size_t i = 0; i + 1 < parts.size(); i += 2) found.emplace_back(*text_of(parts[i]), parts[i + 1]);
  return found;
}

inline Json member(const Object &object, std::string_view key) {
  for (const auto &[name, value] : object) {
    if (name == key) return value;
  }
  return {};
}

}  // namespace emaudit::standalone::detail

#endif  // EMAUDIT_STANDALONE_JSON_HPP
