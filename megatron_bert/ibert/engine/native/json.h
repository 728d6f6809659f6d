// SPDX-License-Identifier: Apache-2.0
// As much of JSON as a plan's header needs. Numbers stay text: nothing here is in floating point.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ibert {

struct Json {
  enum Kind { null, boolean, number, string, array, object } kind = null;
  std::string text;  // of a number or string; "true" or "false"
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& at(const std::string& name) const {
    auto found = members.find(name);
    if (kind != object || found == members.end()) throw std::runtime_error("it has no " + name);
    return found->second;
  }
  bool has(const std::string& name) const {
    auto found = members.find(name);
    return kind == object && found != members.end() && found->second.kind != null;
  }
  int64_t integer(const std::string& name, int64_t low, int64_t high) const {
    int64_t value = at(name).as_integer(name);
    if (value < low || value > high)
      throw std::runtime_error(name + " is " + std::to_string(value) + ", not " + std::to_string(low) + " to " +
                               std::to_string(high));
    return value;
  }
  int64_t as_integer(const std::string& name) const {
    size_t digits = text.size() && text[0] == '-';
    if (kind != number || text.size() == digits || text.size() > digits + 19 ||
        text.find_first_not_of("0123456789", digits) != std::string::npos)
      throw std::runtime_error(name + " is not an integer");
    try {
      return std::stoll(text);
    } catch (const std::out_of_range&) {
      throw std::runtime_error(name + " is too large");
    }
  }
};

class JsonReader {
 public:
  JsonReader(const char* begin, const char* end) : at_(begin), end_(end) {}
  Json document() {
    Json value = read(0);
    space();
    if (at_ != end_) fail();
    return value;
  }

 private:
  const char *at_, *end_;

  [[noreturn]] static void fail() { throw std::runtime_error("its header is not JSON"); }
  void space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) at_++;
  }
  char next() {
    if (at_ == end_) fail();
    return *at_++;
  }
  bool taken(char c) {
    space();
    if (at_ == end_ || *at_ != c) return false;
    at_++;
    return true;
  }
  void word(const char* w) {
    for (; *w; w++)
      if (next() != *w) fail();
  }
  unsigned hex() {
    unsigned value = 0;
    for (int i = 0; i < 4; i++) {
      char c = next();
      int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) fail();
      value = value * 16 + digit;
    }
    return value;
  }
  std::string quoted() {
    std::string out;
    for (;;) {
      char c = next();
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      switch (c = next()) {
        case 'n': out += '\n'; break;
        case 't': out += '\t'; break;
        case 'r': out += '\r'; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'u': {
          unsigned code = hex();
          if (code < 0x80) {
            out += char(code);
          } else if (code < 0x800) {
            out += char(0xC0 | code >> 6);
            out += char(0x80 | (code & 63));
          } else {  // halves of surrogate pairs each on their own: such texts are not looked at
            out += char(0xE0 | code >> 12);
            out += char(0x80 | (code >> 6 & 63));
            out += char(0x80 | (code & 63));
          }
          break;
        }
        case '"': case '\\': case '/': out += c; break;
        default: fail();
      }
    }
  }
  Json read(int depth) {
    if (depth > 32) fail();
    space();
    Json value;
    char c = next();
    if (c == '{') {
      value.kind = Json::object;
      if (taken('}')) return value;
      do {
        if (!taken('"')) fail();
        std::string name = quoted();
        if (!taken(':')) fail();
        value.members[name] = read(depth + 1);
      } while (taken(','));
      if (!taken('}')) fail();
    } else if (c == '[') {
      value.kind = Json::array;
      if (taken(']')) return value;
      do value.items.push_back(read(depth + 1));
      while (taken(','));
      if (!taken(']')) fail();
    } else if (c == '"') {
      value.kind = Json::string;
      value.text = quoted();
    } else if (c == 't' || c == 'f') {
      value.kind = Json::boolean;
      value.text = c == 't' ? "true" : "false";
      word(value.text.c_str() + 1);
    } else if (c == 'n') {
      word("ull");
    } else if (c == '-' || (c >= '0' && c <= '9')) {
      value.kind = Json::number;
      value.text = c;
      while (at_ != end_ && (std::string("+-.eE").find(*at_) != std::string::npos || (*at_ >= '0' && *at_ <= '9')))
        value.text += *at_++;
    } else {
      fail();
    }
    return value;
  }
};

}  // namespace ibert
