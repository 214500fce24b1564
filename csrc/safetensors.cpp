#include "safetensors.h"

#include <algorithm>
#include <cstring>

namespace le {
namespace {

constexpr uint64_t kMaxHeader = 16 << 20;
constexpr size_t kMaxDims = 32;

struct Bits {
  const char *dtype;
  int bits;
};
constexpr Bits kBits[] = {
    {"U64", 64},    {"I64", 64},    {"F64", 64},    {"C64", 64},        {"F32", 32},
    {"U32", 32},    {"I32", 32},    {"BF16", 16},   {"F16", 16},        {"U16", 16},
    {"I16", 16},    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E5M2FNUZ", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E8M0", 8}, {"F6_E3M2", 6}, {"F6_E2M3", 6}, {"I8", 8},          {"U8", 8},
    {"F4", 4},      {"BOOL", 8},
};

int bits_of(const std::string &dtype) {
  for (const Bits &b : kBits)
    if (dtype == b.dtype) return b.bits;
  return 0;
}

std::string shortened(const std::string &text) {
  return text.size() <= 200 ? text : text.substr(0, 200) + "...";
}

// The JSON that a header may be: {"name": {"dtype": "", "shape": [], "data_offsets": []}, ...,
// "__metadata__": {"": ""}}. Nothing nests deeper, so nothing here calls itself.
class HeaderReader {
 public:
  HeaderReader(const char *op, const char *text, size_t size)
      : op_(op), begin_(text), at_(text), end_(text + size) {}

  std::vector<Tensor> read() {
    std::vector<Tensor> tensors;
    bool metadata = false;
    members([&](const std::string &name) {
      if (name == "__metadata__") {
        if (metadata) fail_here("expected __metadata__ once");
        metadata = true;
        std::vector<std::string> keys;
        members([&](const std::string &key) {
          keys.push_back(key);
          string();
        });
        no_twins(&keys);
        return;
      }
      tensors.push_back(tensor());
      tensors.back().name = name;
    });
    skip_space();
    if (at_ != end_) fail_here("expected the end of the header");
    return tensors;
  }

 private:
  [[noreturn]] void fail_here(const char *what) const {
    fail(LE_ERROR_VALUE, "%s: bytes: header of safetensors, byte %lld: %s", op_,
         static_cast<long long>(at_ - begin_), what);
  }

  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
  }
  bool take(char c) {
    skip_space();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (take(c)) return;
    char what[] = "expected 'x'";
    what[10] = c;
    fail_here(what);
  }

  // Calls member(name) at the value of each member of an object.
  template <class Member>
  void members(Member &&member) {
    expect('{');
    if (take('}')) return;
    do {
      std::string name = string();
      expect(':');
      member(name);
    } while (take(','));
    expect('}');
  }

  void no_twins(std::vector<std::string> *names) const {
    std::sort(names->begin(), names->end());
    if (std::adjacent_find(names->begin(), names->end()) != names->end())
      fail_here("expected each key once");
  }

  Tensor tensor() {
    Tensor t;
    int seen = 0;
    members([&](const std::string &key) {
      int bit = key == "dtype" ? 1 : key == "shape" ? 2 : key == "data_offsets" ? 4 : 0;
      if (!bit || (seen & bit)) fail_here("expected dtype, shape and data_offsets, each once");
      seen |= bit;
      if (bit == 1) {
        t.dtype = string();
      } else if (bit == 2) {
        numbers(kMaxDims, [&](uint64_t n) { t.shape.push_back(static_cast<int64_t>(n)); });
      } else {
        int count = 0;
        numbers(2, [&](uint64_t n) { (count++ ? t.end : t.begin) = n; });
        if (count != 2) fail_here("expected two offsets");
      }
    });
    if (seen != 7) fail_here("expected dtype, shape and data_offsets, each once");
    return t;
  }

  template <class Each>
  void numbers(size_t most, Each &&each) {
    expect('[');
    if (take(']')) return;
    size_t count = 0;
    do {
      if (++count > most) fail_here("expected fewer numbers");
      each(number());
    } while (take(','));
    expect(']');
  }

  // A whole number from 0 within int64, as JSON spells it.
  uint64_t number() {
    skip_space();
    const char *first = at_;
    uint64_t value = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      uint64_t digit = static_cast<uint64_t>(*at_ - '0');
      if (value > (uint64_t(INT64_MAX) - digit) / 10) fail_here("expected a number within int64");
      value = 10 * value + digit;
    }
    if (at_ == first || (*first == '0' && at_ - first > 1)) fail_here("expected a whole number");
    return value;
  }

  std::string string() {
    expect('"');
    std::string text;
    for (;;) {
      const char *first = at_;
      while (at_ != end_ && *at_ != '"' && *at_ != '\\' && static_cast<uint8_t>(*at_) >= 0x20)
        ++at_;
      if (!is_utf8(first, static_cast<size_t>(at_ - first))) fail_here("expected UTF-8");
      text.append(first, at_);
      if (at_ == end_ || static_cast<uint8_t>(*at_) < 0x20) fail_here("expected the end of a text");
      if (*at_++ == '"') return text;
      escaped(&text);
    }
  }

  void escaped(std::string *text) {
    constexpr char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
    if (at_ == end_) fail_here("expected the end of a text");
    char c = *at_++;
    if (const char *found = c ? std::strchr(kFrom, c) : nullptr) {
      *text += kTo[found - kFrom];
      return;
    }
    if (c != 'u') fail_here("expected an escape of JSON");
    uint32_t code = hex();
    if (code >= 0xd800 && code < 0xdc00) {
      if (end_ - at_ < 2 || at_[0] != '\\' || at_[1] != 'u') fail_here("half a surrogate pair");
      at_ += 2;
      uint32_t low = hex();
      if (low < 0xdc00 || low > 0xdfff) fail_here("half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code < 0xe000) {
      fail_here("half a surrogate pair");
    }
    append_utf8(code, text);
  }

  uint32_t hex() {
    if (end_ - at_ < 4) fail_here("expected four hexadecimal digits");
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      char c = *at_++;
      int digit = c >= '0' && c <= '9'   ? c - '0'
                  : c >= 'a' && c <= 'f' ? c - 'a' + 10
                  : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                         : -1;
      if (digit < 0) fail_here("expected four hexadecimal digits");
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void append_utf8(uint32_t code, std::string *text) {
    auto put = [&](uint32_t byte) { *text += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xc0 | code >> 6);
    } else {
      if (code < 0x10000) {
        put(0xe0 | code >> 12);
      } else {
        put(0xf0 | code >> 18);
        put(0x80 | (code >> 12 & 0x3f));
      }
      put(0x80 | (code >> 6 & 0x3f));
    }
    put(0x80 | (code & 0x3f));
  }

  const char *op_, *begin_, *at_, *end_;
};

// Dtype, shape and offsets agree, within `size` bytes of data.
void check_size(const char *op, const Tensor &t, uint64_t size) {
  std::string name = shortened(t.name);
  int bits = bits_of(t.dtype);
  if (!bits)
    fail(LE_ERROR_VALUE, "%s: bytes: %s: expected a dtype of safetensors, got %s", op, name.c_str(),
         shortened(t.dtype).c_str());
  if (t.begin > t.end || t.end > size)
    fail(LE_ERROR_VALUE, "%s: bytes: %s: expected offsets in 0..%llu, got %llu and %llu", op,
         name.c_str(), static_cast<unsigned long long>(size),
         static_cast<unsigned long long>(t.begin), static_cast<unsigned long long>(t.end));
  uint64_t count = 1;
  bool fits = true, empty = false;
  for (int64_t n : t.shape) empty = empty || n == 0;
  for (int64_t n : t.shape)
    fits = fits && (empty || !__builtin_mul_overflow(count, static_cast<uint64_t>(n), &count));
  if (empty) count = 0;
  // A product of so many bits that it wraps cannot be that of bytes that are here.
  fits = fits && count <= UINT64_MAX / 64 &&
         count * static_cast<uint64_t>(bits) == 8 * (t.end - t.begin);
  if (!fits)
    fail(LE_ERROR_VALUE, "%s: bytes: %s: expected as many bytes as dtype and shape say, got %llu",
         op, name.c_str(), static_cast<unsigned long long>(t.end - t.begin));
}

void check_names(const char *op, const std::vector<Tensor> &tensors) {
  std::vector<const std::string *> names;
  for (const Tensor &t : tensors) names.push_back(&t.name);
  auto less = [](const std::string *a, const std::string *b) { return *a < *b; };
  std::sort(names.begin(), names.end(), less);
  for (size_t i = 1; i < names.size(); ++i)
    if (*names[i] == *names[i - 1])
      fail(LE_ERROR_VALUE, "%s: bytes: %s: expected once, got twice", op,
           shortened(*names[i]).c_str());
}

void append_json(const std::string &text, std::string *to) {
  constexpr char kHex[] = "0123456789abcdef";
  *to += '"';
  for (char c : text) {
    uint8_t byte = static_cast<uint8_t>(c);
    if (c == '"' || c == '\\') *to += '\\';
    if (byte < 0x20) {
      *to += "\\u00";
      *to += kHex[byte >> 4];
      *to += kHex[byte & 15];
    } else {
      *to += c;
    }
  }
  *to += '"';
}

}  // namespace

bool is_utf8(const char *text, size_t size) {
  const uint8_t *p = reinterpret_cast<const uint8_t *>(text), *end = p + size;
  while (p != end) {
    uint8_t first = *p++;
    if (first < 0x80) continue;
    int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
    if (first < 0xc2 || first > 0xf4 || end - p < more) return false;
    uint32_t code = first & (0x3f >> more);
    for (int i = 0; i < more; ++i, ++p) {
      if ((*p & 0xc0) != 0x80) return false;
      code = code << 6 | (*p & 0x3f);
    }
    uint32_t least = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0x80;
    if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
  }
  return true;
}

std::vector<Tensor> read_safetensors(const char *op, const void *bytes, size_t size) {
  if (size < 8)
    fail(LE_ERROR_VALUE, "%s: bytes: expected a safetensors file, got %zu bytes", op, size);
  const char *text = static_cast<const char *>(bytes);
  uint64_t length = 0;  // little endian, on any machine
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<uint8_t>(text[i]);
  uint64_t most = std::min<uint64_t>(kMaxHeader, size - 8);
  if (length > most)
    fail(LE_ERROR_VALUE, "%s: bytes: header: expected at most %llu bytes, got %llu", op,
         static_cast<unsigned long long>(most), static_cast<unsigned long long>(length));
  std::vector<Tensor> tensors = HeaderReader(op, text + 8, static_cast<size_t>(length)).read();
  const char *data = text + 8 + length;
  uint64_t there = size - 8 - length, at = 0;
  for (Tensor &t : tensors) {
    check_size(op, t, there);
    t.data = data + t.begin;
  }
  check_names(op, tensors);
  std::sort(tensors.begin(), tensors.end(), [](const Tensor &a, const Tensor &b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  for (const Tensor &t : tensors) {
    if (t.begin != at)
      fail(LE_ERROR_VALUE, "%s: bytes: %s: expected data without holes", op,
           shortened(t.name).c_str());
    at = t.end;
  }
  if (at != there)
    fail(LE_ERROR_VALUE, "%s: bytes: expected %llu bytes of data, got %llu", op,
         static_cast<unsigned long long>(at), static_cast<unsigned long long>(there));
  return tensors;
}

std::string safetensors_header(std::vector<Tensor> *tensors) {
  std::string json = "{";
  uint64_t at = 0;
  for (Tensor &t : *tensors) {
    uint64_t count = 1;
    std::string shape;
    for (int64_t n : t.shape) {
      count *= static_cast<uint64_t>(n);
      shape += (shape.empty() ? "" : ",") + std::to_string(n);
    }
    t.begin = at;
    at = t.end = at + count * static_cast<uint64_t>(bits_of(t.dtype)) / 8;
    if (json.size() > 1) json += ',';
    append_json(t.name, &json);
    json += ":{\"dtype\":\"" + t.dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
            std::to_string(t.begin) + "," + std::to_string(t.end) + "]}";
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');  // so that the data are aligned
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(json.size() >> 8 * i);
  return length + json;
}

}  // namespace le
