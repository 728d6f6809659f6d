// SPDX-License-Identifier: Apache-2.0
// A plan's file: safetensors, whose metadata hold the plan's numbers as JSON. Everything is checked before it is used.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "digest.h"
#include "json.h"
#include "model.h"

namespace ibert {

struct Embeddings {
  const int8_t* word;
  Rescale word_rescale;
  const int16_t *position, *token_type;
  int words, positions, types, first_position, limit;
  bool normed;
  Norm norm;
  // Tokens that a sequence may have.
  int longest() const { return positions - first_position; }
};
struct Wide {
  const int8_t* shift;
  const int32_t* multiplier;
};
struct Pooler {
  Read8 read;
  Matrix matrix;
  Rescale rescale;
};
struct Dense {
  Read8 read;
  Matrix matrix;
  Wide wide;
};
struct MaskedLanguage {
  Read8 read;
  Matrix dense, decoder;
  Rescale rescale;
  Gelu gelu;
  int gelu_read, gelu_limit;
  Norm norm;
  Wide wide;
};

// Its tables are in the bytes that it was read from, or in `copies` where those are not aligned.
struct Plan {
  int hidden, hidden_exponent;
  Embeddings embeddings;
  std::vector<Layer> layers;
  bool normed = false;
  Norm final_norm;
  std::unique_ptr<Pooler> pooler;
  std::unique_ptr<Dense> classifier, pair;
  std::unique_ptr<MaskedLanguage> masked;
  std::vector<std::unique_ptr<uint8_t[]>> copies;
};

// Reads a plan from memory.
class PlanReader {
 public:
  PlanReader(const uint8_t* bytes, size_t size) {
    if (size < 8) fail("it is cut off");
    uint64_t header = 0;
    for (int i = 0; i < 8; i++) header |= uint64_t(bytes[i]) << (8 * i);
    if (header > size - 8 || header > 100000000) fail("it is cut off, or no safetensors file");
    const char* text = reinterpret_cast<const char*>(bytes + 8);
    header_ = JsonReader(text, text + header).document();
    data_ = bytes + 8 + header;
    size_ = size - 8 - header;
  }
  Plan read() {
    const Json& metadata = header_.at("__metadata__");
    if (!metadata.has("format") || metadata.at("format").text != FORMAT) fail("it is not an integer plan");
    for (auto [name, known] : {std::make_pair("version", VERSION), std::make_pair("arithmetic", ARITHMETIC)}) {
      const std::string found = metadata.has(name) ? metadata.at(name).text : "none";
      if (found != known) fail("it has " + std::string(name) + " " + found + ", and this engine reads " + known);
    }
    const std::string& text = metadata.at("plan").text;
    const Json plan = JsonReader(text.data(), text.data() + text.size()).document();
    Plan out;
    out.hidden_exponent = int(plan.integer("hidden_exponent", -64, 64));
    embeddings(plan.at("embeddings"), out);
    const Json& layers = plan.at("layers");
    for (size_t i = 0; i < layers.items.size(); i++)
      out.layers.push_back(layer(layers.items[i], "layers." + std::to_string(i) + ".", out.hidden));
    if (plan.has("final_norm")) {
      out.normed = true;
      out.final_norm = norm(plan.at("final_norm"), "final_norm.", out.hidden);
    }
    const Json& heads = plan.at("heads");
    if (heads.has("pooler")) {
      const Json& j = heads.at("pooler");
      out.pooler.reset(new Pooler{read8(j.at("read")), matrix("heads.pooler.matrix.", -1, out.hidden), {}});
      out.pooler->rescale = rescale("heads.pooler.rescale.", out.pooler->matrix.rows);
      if (out.pooler->matrix.rows != out.hidden) fail("its pooler has another size");
    }
    if (heads.has("classifier")) out.classifier.reset(dense(heads.at("classifier"), "heads.classifier.", out.hidden));
    if (heads.has("pair")) out.pair.reset(dense(heads.at("pair"), "heads.pair.", out.hidden));
    if (heads.has("masked")) masked(heads.at("masked"), out);
    out.copies = std::move(copies_);
    return out;
  }

  // Whether the file is what was written: its digest is that of the plan's text and of all tensors by name. `read` is
  // called after each.
  template <class F>
  void check_digest(F read) const {
    const Json& metadata = header_.at("__metadata__");
    if (!metadata.has("digest")) fail("it is damaged: its header is cut");
    Digest digest;
    size_t last = 0;
    digest.add(metadata.at("plan").text);
    for (const auto& [name, entry] : header_.members) {
      if (name == "__metadata__") continue;
      std::string type = entry.at("dtype").text, shape;
      type = type == "U8" ? "uint8" : "int" + type.substr(type.empty() ? 0 : 1);
      for (const Json& size : entry.at("shape").items) shape += (shape.empty() ? "" : ", ") + size.text;
      digest.add(name + " torch." + type + " [" + shape + "]\n");
      const auto [begin, end] = extent(name, entry);
      digest.add(data_ + begin, end - begin);
      last = std::max(last, end);
      read();
    }
    if (last != size_) fail("it is damaged: there is more in it than its tensors");
    if (digest.hexadecimal() != metadata.at("digest").text) fail("it is damaged: its digest is another");
  }

  static constexpr const char* FORMAT = "megatron-bert integer plan";
  static constexpr const char *VERSION = "1", *ARITHMETIC = "2";

 private:
  Json header_;
  const uint8_t* data_;
  size_t size_;
  static constexpr int LARGEST = 1 << 24, WIDEST = 12288;

  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error(what); }

  // Where a tensor's bytes are.
  std::pair<size_t, size_t> extent(const std::string& name, const Json& entry) const {
    const Json& offsets = entry.at("data_offsets");
    if (offsets.items.size() != 2) fail(name + " has no place in the file");
    const int64_t begin = offsets.items[0].as_integer("an offset"), end = offsets.items[1].as_integer("an offset");
    if (begin < 0 || end < begin || uint64_t(end) > size_)
      fail(name + " lies outside of the file: it is cut off or damaged");
    return {size_t(begin), size_t(end)};
  }

  // A tensor [shape..]; a size of -1 is whatever the file says, and is written back.
  template <class T>
  const T* tensor(const std::string& name, const char* type, std::initializer_list<int*> shape) {
    const Json& entry = header_.at(name);
    const Json& dims = entry.at("shape");
    if (entry.at("dtype").text != type || dims.items.size() != shape.size())
      fail(name + " has another type or shape");
    uint64_t count = sizeof(T);
    size_t i = 0;
    for (int* wanted : shape) {
      const int64_t found = dims.items[i++].as_integer("a size of " + name);
      if (found < 1 || found > LARGEST || (*wanted >= 0 && found != *wanted)) fail(name + " has another shape");
      *wanted = int(found);
      count *= uint64_t(found);
    }
    const auto [begin, end] = extent(name, entry);
    if (end - begin != count) fail(name + " lies outside of the file: it is cut off or damaged");
    const uint8_t* at = data_ + begin;
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) {  // rare, and copied
      copies_.emplace_back(new uint8_t[count + 8]);
      uint8_t* to = copies_.back().get();
      to += (sizeof(T) - reinterpret_cast<uintptr_t>(to) % sizeof(T)) % sizeof(T);
      std::memcpy(to, at, count);
      at = to;
    }
    return reinterpret_cast<const T*>(at);
  }
  std::vector<std::unique_ptr<uint8_t[]>> copies_;

  Matrix matrix(const std::string& at, int rows, int depth) {
    Matrix m = {rows, depth, nullptr, nullptr};
    m.weight = tensor<int8_t>(at + "weight", "I8", {&m.rows, &m.depth});
    m.bias = tensor<int32_t>(at + "bias", "I32", {&m.rows});
    if (m.depth > WIDEST) fail(at + "weight has more than " + std::to_string(WIDEST) + " columns");
    return m;
  }
  Rescale rescale(const std::string& at, int rows) {
    Rescale r = {tensor<int8_t>(at + "shift", "I8", {&rows}), tensor<int16_t>(at + "multiplier", "I16", {&rows})};
    for (int i = 0; i < rows; i++)
      if (r.shift[i] < -15 || r.shift[i] > 30 || r.multiplier[i] < 0) fail(at + "shift or multiplier is out of range");
    return r;
  }
  Wide wide(const std::string& at, int rows) {
    Wide w = {tensor<int8_t>(at + "shift", "I8", {&rows}), tensor<int32_t>(at + "multiplier", "I32", {&rows})};
    for (int i = 0; i < rows; i++)
      if (w.shift[i] < 1 || w.shift[i] > 52 || w.multiplier[i] < 0 || w.multiplier[i] > 1 << 23)
        fail(at + "shift or multiplier is out of range");
    return w;
  }
  Norm norm(const Json& j, const std::string& at, int columns) {
    if (columns > 8192) fail("rows have more than 8192 columns");
    Norm n;
    n.read = int(j.integer("read", -64, 64));
    n.read_limit = int(j.integer("read_limit", 1, 32767));
    n.gain = tensor<int16_t>(at + "gain", "I16", {&columns});
    n.offset = tensor<int32_t>(at + "offset", "I32", {&columns});
    n.shift = int(j.integer("shift", 1, 24));
    n.epsilon = j.integer("epsilon", 0, int64_t(1) << 60);
    n.limit = int(j.integer("limit", 1, 32767));
    return n;
  }
  static Read8 read8(const Json& j) {
    return {int(j.integer("shift", -128, 128)), int(j.integer("multiplier", 0, 32767)), int(j.integer("limit", 1, 127))};
  }
  void embeddings(const Json& j, Plan& out) {
    Embeddings& e = out.embeddings;
    e.words = e.positions = e.types = out.hidden = -1;
    e.word = tensor<int8_t>("embeddings.word", "I8", {&e.words, &out.hidden});
    e.word_rescale = rescale("embeddings.word_rescale.", e.words);
    e.position = tensor<int16_t>("embeddings.position", "I16", {&e.positions, &out.hidden});
    e.token_type = tensor<int16_t>("embeddings.token_type", "I16", {&e.types, &out.hidden});
    e.first_position = int(j.integer("first_position", 0, e.positions - 1));
    e.limit = int(j.integer("limit", 1, 32767));
    e.normed = j.has("norm");
    if (e.normed) e.norm = norm(j.at("norm"), "embeddings.norm.", out.hidden);
    if (e.positions > 16384) fail("sequences have more than 16384 tokens");
  }
  Layer layer(const Json& j, const std::string& at, int hidden) {
    Layer l;
    l.post = j.has("read_attention");
    if (l.post != j.has("read_mlp")) fail("a layer has one read8 only");
    l.read_attention = l.read_mlp = {0, 0, 1};
    if (l.post) l.read_attention = read8(j.at("read_attention")), l.read_mlp = read8(j.at("read_mlp"));
    l.attention_norm = norm(j.at("attention_norm"), at + "attention_norm.", hidden);
    l.mlp_norm = norm(j.at("mlp_norm"), at + "mlp_norm.", hidden);
    if (!l.post && (l.attention_norm.limit > 127 || l.mlp_norm.limit > 127)) fail("a norm's limit is above 127");
    l.query_key_value = matrix(at + "query_key_value.", -1, hidden);
    l.query_key_value_rescale = rescale(at + "query_key_value_rescale.", l.query_key_value.rows);
    const Json& a = j.at("attention");
    l.heads = int(a.integer("heads", 1, LARGEST));
    if (l.query_key_value.rows % (3 * int64_t(l.heads))) fail("rows of query_key_value are not a multiple of heads");
    const int attended = l.query_key_value.rows / 3;
    if (attended / l.heads > 1040 || attended > WIDEST) fail("heads are too wide");
    l.query_limit = int(a.integer("limit", 1, 127));
    l.score_shift = int(a.integer("score_shift", -16, 31));
    l.score_multiplier = int(a.integer("score_multiplier", 0, 65535));
    l.context_multiplier = int(a.integer("mean_multiplier", 0, 32767));
    l.context_exponent = int(a.integer("mean_exponent", -128, 128));
    l.context_limit = int(a.integer("context_limit", 1, 127));
    l.attention_output = matrix(at + "attention_output.", hidden, attended);
    l.attention_output_rescale = rescale(at + "attention_output_rescale.", hidden);
    l.attention_read = int(j.integer("attention_read", -64, 64));
    l.attention_limit = int(j.integer("attention_limit", 1, 32767));
    l.intermediate = matrix(at + "intermediate.", -1, hidden);
    l.intermediate_rescale = rescale(at + "intermediate_rescale.", l.intermediate.rows);
    const Json& g = j.at("gelu");
    l.gelu = {int(g.integer("exponent", 1, 13)), int(g.integer("multiplier", 0, 32767)),
              int(g.integer("zero_point", 0, 255)), int(g.integer("top", 1, 255))};
    if (l.gelu.zero_point > l.gelu.top) fail("a zero point is out of range");
    l.output = matrix(at + "output.", hidden, l.intermediate.rows);
    l.output_rescale = rescale(at + "output_rescale.", hidden);
    l.output_read = int(j.integer("output_read", -64, 64));
    l.output_limit = int(j.integer("output_limit", 1, 32767));
    return l;
  }
  Dense* dense(const Json& j, const std::string& at, int hidden) {
    std::unique_ptr<Dense> d(new Dense{read8(j.at("read")), matrix(at + "matrix.", -1, hidden), {}});
    d->wide = wide(at + "wide.", d->matrix.rows);
    return d.release();
  }
  void masked(const Json& j, Plan& out) {
    std::unique_ptr<MaskedLanguage> m(new MaskedLanguage);
    const std::string at = "heads.masked.";
    m->read = read8(j.at("read"));
    m->dense = matrix(at + "dense.", out.hidden, out.hidden);
    m->rescale = rescale(at + "rescale.", out.hidden);
    m->gelu = {int(j.integer("exponent", 1, 13)), 0, 0, 0};
    m->gelu_read = int(j.integer("gelu_read", -64, 64));
    m->gelu_limit = int(j.integer("gelu_limit", 1, 32767));
    m->norm = norm(j.at("norm"), at + "norm.", out.hidden);
    if (m->norm.limit > 127) fail("a norm's limit is above 127");
    m->decoder = {out.embeddings.words, out.hidden, out.embeddings.word, nullptr};
    if (header_.has(at + "decoder"))
      m->decoder.weight = tensor<int8_t>(at + "decoder", "I8", {&m->decoder.rows, &m->decoder.depth});
    m->decoder.bias = tensor<int32_t>(at + "bias", "I32", {&m->decoder.rows});
    m->wide = wide(at + "wide.", m->decoder.rows);
    out.masked = std::move(m);
  }
};

}  // namespace ibert
