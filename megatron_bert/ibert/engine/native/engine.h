// SPDX-License-Identifier: Apache-2.0
// A plan packed for an instruction set, and the order of what is run.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "model.h"
#include "plan_file.h"
#include "pool.h"

namespace ibert {

struct PackedLayer {
  uint8_t* matrices[4];
  Block norms[2];
};

namespace {

// rs and sat16 of one value.
int32_t shifted(int32_t a, int shift) {
  int64_t wide = a;
  if (shift > 40) return 0;
  wide = shift > 0 ? (wide + (int64_t(1) << (shift - 1))) >> shift : wide * (int64_t(1) << (shift < -20 ? 20 : -shift));
  return wide < -32768 ? -32768 : wide > 32767 ? 32767 : int32_t(wide);
}

int32_t clamp(int64_t a, int32_t limit) { return a < -limit ? -limit : a > limit ? limit : int32_t(a); }

// tanh of t / (2^10 2 log2 e), 15 fraction bits.
int32_t tangent(int32_t t) {
  const int32_t size = t < 0 ? -t : t, f = size & 1023;
  int32_t h = ((-1316 * f) >> 10) + 7600;
  h = ((h * f) >> 10) - 22670;
  const int32_t decay = (((h * f) >> 10) + 32768) >> (size >> 10);
  const int32_t result = (((32768 - decay) << 15) + ((32768 + decay) >> 1)) / (32768 + decay);
  return (result > 32767 ? 32767 : result) * (t < 0 ? -1 : t > 0);
}

}  // namespace

class Engine {
 public:
  // A plan that lives as long as the constructor.
  Engine(const uint8_t* bytes, size_t size, int threads) : target_(chosen_target()), pool_(threads) {
    PlanReader reader(bytes, size);
    make(reader);
    keep(plan_.embeddings.word, size_t(plan_.embeddings.words) * plan_.hidden);
    keep_tables();
  }
  // A plan's file, whose digest is checked; its table of words stays there.
  Engine(std::unique_ptr<File> file, int threads) : file_(std::move(file)), target_(chosen_target()), pool_(threads) {
    PlanReader reader(file_->data(), file_->size());
    reader.check_digest([this] { forget(); });
    make(reader);
    words_at_ = size_t((const uint8_t*)plan_.embeddings.word - file_->data());
    keep_tables();
    file_->unmap();
  }

  const Target& target() const { return *target_; }
  const Plan& plan() const { return plan_; }
  int outputs(const std::string& head) const {
    if (head == "pooler") return plan_.pooler ? plan_.hidden : 0;
    if (head == "classifier") return plan_.classifier ? plan_.classifier->matrix.rows : 0;
    if (head == "pair") return plan_.pair ? plan_.pair->matrix.rows : 0;
    if (head == "masked") return plan_.masked ? plan_.masked->decoder.rows : 0;
    return 0;
  }

  void encode(const int32_t* tokens, const int32_t* positions, const int32_t* types, const int32_t* starts, int sequences,
              int16_t* hidden) {
    const Embeddings& e = plan_.embeddings;
    const int longest_allowed = e.longest();
    if (sequences < 0 || (sequences > 0 && starts[0] != 0)) throw std::runtime_error("the first sequence does not begin at 0");
    int longest = 0;
    for (int i = 0; i < sequences; i++) {
      const int64_t length = int64_t(starts[i + 1]) - starts[i];
      if (length < 0) throw std::runtime_error("sequence " + std::to_string(i) + " ends before it begins");
      if (length > longest_allowed)
        throw std::runtime_error("sequence " + std::to_string(i) + " has " + std::to_string(length) +
                                 " tokens, but the model takes at most " + std::to_string(longest_allowed));
      longest = std::max(longest, int(length));
    }
    const int rows = sequences ? starts[sequences] : 0;
    if (rows == 0) return;
    const Sizes sizes = {rows, sequences, longest, plan_.hidden};
    const size_t stride = rounded_up(plan_.hidden, 64), padded = rounded_up(rows, 32) + 32;
    const size_t activation = target_->activation_bytes;
    Buffers b;
    b.stream = (int16_t*)stream_.of(padded * stride * 2);
    b.narrow = narrow_.of(padded * std::max(stride, rounded_up(attended_, 64)) * activation);
    b.qkv = (int8_t*)qkv_.of(padded * rounded_up(3 * attended_, 64));
    b.wide = wide_.of(padded * rounded_up(widest_, 64) * activation);
    b.scratch_stride = rounded_up(layers_.empty() ? 64 : target_->scratch_bytes(dim_, longest), 4096);
    b.scratch = scratch_.of(b.scratch_stride * pool_.threads);
    EmbedJob job{this, tokens, positions, types, starts, sizes, b.stream, stride};
    embed(job);
    if (e.normed)
      target_->norm(&pool_, (const PackedNorm*)embedding_norm_.data(), plan_.hidden, rows, b.stream, stride);
    for (size_t i = 0; i < layers_.size(); i++) {
      const PackedLayer& p = *layers_[i];
      const Packed* matrices[4];
      for (int j = 0; j < 4; j++) matrices[j] = (const Packed*)p.matrices[j];
      const PackedNorm* norms[2] = {(const PackedNorm*)p.norms[0].data(), (const PackedNorm*)p.norms[1].data()};
      target_->layer(&pool_, plan_.layers[i], matrices, norms, sizes, starts, b);
    }
    if (plan_.normed)
      target_->norm(&pool_, (const PackedNorm*)final_norm_.data(), plan_.hidden, rows, b.stream, stride);
    for (int row = 0; row < rows; row++)
      std::memcpy(hidden + size_t(row) * plan_.hidden, b.stream + row * stride, 2 * size_t(plan_.hidden));
  }

  void head(const std::string& name, const int16_t* rows, int count, int32_t* out) {
    const int columns = outputs(name);
    if (columns == 0) throw std::runtime_error("the plan has no head '" + name + "'");
    if (count <= 0) return;
    const size_t stride = rounded_up(plan_.hidden, 64), padded = rounded_up(count, 32) + 32;
    auto* stream = (int16_t*)head_stream_.of(padded * stride * 2);
    void* narrow = head_narrow_.of(padded * stride * target_->activation_bytes);
    for (int row = 0; row < count; row++)
      std::memcpy(stream + row * stride, rows + size_t(row) * plan_.hidden, 2 * size_t(plan_.hidden));
    auto enter = [&](const Read8& read) {
      target_->read8(&pool_, read, plan_.hidden, count, stream, stride, narrow, stride);
    };
    if (name == "pooler") {
      enter(plan_.pooler->read);
      target_->rescaled(&pool_, (const Packed*)pooler_.data(), narrow, stride, count, stream, stride);
      for (int row = 0; row < count; row++)
        for (int i = 0; i < columns; i++)
          out[size_t(row) * columns + i] = tangent(clamp(stream[row * stride + i], 16384));
      return;
    }
    if (name == "masked") {
      const MaskedLanguage& m = *plan_.masked;
      enter(m.read);
      target_->rescaled(&pool_, (const Packed*)masked_dense_.data(), narrow, stride, count, stream, stride);
      for (int row = 0; row < count; row++) {
        target_->gelu16(m.gelu, stream + row * stride, stride);
        for (int i = 0; i < plan_.hidden; i++)
          stream[row * stride + i] = int16_t(clamp(shifted(stream[row * stride + i], m.gelu_read), m.gelu_limit));
      }
      target_->norm8(&pool_, (const PackedNorm*)masked_norm_.data(), plan_.hidden, count, stream, stride, narrow, stride);
      return sums(decoder_, m.wide, narrow, stride, count, columns, out);
    }
    const bool pair = name == "pair";
    const Dense& dense = pair ? *plan_.pair : *plan_.classifier;
    enter(dense.read);
    sums(pair ? pair_ : classifier_, dense.wide, narrow, stride, count, columns, out);
  }

 private:
  std::unique_ptr<File> file_;
  const Target* target_;
  Threads pool_;
  Plan plan_;
  std::vector<std::unique_ptr<PackedLayer>> layers_;
  Block weights_, final_norm_, embedding_norm_, pooler_, classifier_, pair_, masked_dense_, masked_norm_, decoder_;
  std::vector<std::unique_ptr<Block>> tables_;
  Block stream_, narrow_, qkv_, wide_, scratch_, head_stream_, head_narrow_;
  int widest_ = 1, attended_ = 1, dim_ = 1;
  size_t words_at_ = 0;

  void make(PlanReader& reader) {
    plan_ = reader.read();
    forget();
    size_t room = 0;
    for (const Layer& l : plan_.layers)
      for (const Matrix* m : {&l.query_key_value, &l.attention_output, &l.intermediate, &l.output})
        room += rounded_up(target_->packed_bytes(*m), 64);
    uint8_t* next = weights_.of(room);
    for (const Layer& l : plan_.layers) {
      layers_.emplace_back(new PackedLayer);
      PackedLayer& p = *layers_.back();
      const Matrix* matrices[4] = {&l.query_key_value, &l.attention_output, &l.intermediate, &l.output};
      const Rescale* rescales[4] = {&l.query_key_value_rescale, &l.attention_output_rescale, &l.intermediate_rescale,
                                    &l.output_rescale};
      for (int i = 0; i < 4; i++) {
        p.matrices[i] = next;
        target_->pack(*matrices[i], rescales[i], i == 3 ? l.gelu.zero_point - target_->less : target_->zero, next);
        next += rounded_up(target_->packed_bytes(*matrices[i]), 64);
      }
      forget();
      pack(l.attention_norm, p.norms[0]);
      pack(l.mlp_norm, p.norms[1]);
      widest_ = std::max(widest_, l.intermediate.rows);
      attended_ = std::max(attended_, l.query_key_value.rows / 3);
      dim_ = std::max(dim_, l.query_key_value.rows / 3 / l.heads);
    }
    if (plan_.normed) pack(plan_.final_norm, final_norm_);
    if (plan_.embeddings.normed) pack(plan_.embeddings.norm, embedding_norm_);
    if (plan_.pooler) pack(plan_.pooler->matrix, &plan_.pooler->rescale, target_->zero, pooler_);
    if (plan_.classifier) pack(plan_.classifier->matrix, nullptr, target_->zero, classifier_);
    if (plan_.pair) pack(plan_.pair->matrix, nullptr, target_->zero, pair_);
    if (plan_.masked) {
      pack(plan_.masked->dense, &plan_.masked->rescale, target_->zero, masked_dense_);
      pack(plan_.masked->norm, masked_norm_);
      pack(plan_.masked->decoder, nullptr, target_->zero, decoder_);
    }
    forget();
  }
  void forget() const {
    if (file_) file_->forget();
  }

  void pack(const Matrix& m, const Rescale* rescale, int zero, Block& to) {
    target_->pack(m, rescale, zero, to.of(target_->packed_bytes(m)));
  }
  void pack(const Norm& n, Block& to) { target_->pack_norm(n, plan_.hidden, to.of(target_->packed_norm_bytes(plan_.hidden))); }
  // Copies a table.
  template <class T>
  void keep(const T*& table, size_t count) {
    tables_.emplace_back(new Block);
    uint8_t* copy = tables_.back()->of(count * sizeof(T) + 64);
    std::memcpy(copy, table, count * sizeof(T));
    table = reinterpret_cast<const T*>(copy);
  }
  void keep(Wide& wide, size_t count) {
    keep(wide.shift, count);
    keep(wide.multiplier, count);
  }
  // All but that of words.
  void keep_tables() {
    Embeddings& e = plan_.embeddings;
    keep(e.position, size_t(e.positions) * plan_.hidden);
    keep(e.token_type, size_t(e.types) * plan_.hidden);
    keep(e.word_rescale.shift, e.words);
    keep(e.word_rescale.multiplier, e.words);
    if (plan_.classifier) keep(plan_.classifier->wide, plan_.classifier->matrix.rows);
    if (plan_.pair) keep(plan_.pair->wide, plan_.pair->matrix.rows);
    if (plan_.masked) keep(plan_.masked->wide, plan_.masked->decoder.rows);
  }
  // A row of the table of words, in the memory given if it comes from the file.
  const int8_t* word(int32_t token, int8_t* memory) const {
    const size_t at = size_t(token) * plan_.hidden;
    if (!file_) return plan_.embeddings.word + at;
    file_->read(words_at_ + at, memory, plan_.hidden);
    return memory;
  }

  struct EmbedJob {
    const Engine* engine;
    const int32_t *tokens, *positions, *types, *starts;
    Sizes sizes;
    int16_t* stream;
    size_t stride;
    std::atomic<int> next{0};
    std::atomic<bool> failed{false};
  };
  static void embed_part(void* argument, int) {
    auto* job = static_cast<EmbedJob*>(argument);
    constexpr int STEP = 16;
    try {
      std::vector<int8_t> memory(job->engine->plan_.hidden);
      for (int row = STEP * job->next++; row < job->sizes.tokens; row = STEP * job->next++)
        for (int i = row; i < std::min(row + STEP, job->sizes.tokens); i++) job->engine->embed_row(*job, i, memory.data());
    } catch (const std::exception&) {  // which must not leave the thread
      job->failed = true;
    }
  }
  void embed_row(const EmbedJob& job, int row, int8_t* memory) const {
    const Embeddings& e = plan_.embeddings;
    const size_t width = plan_.hidden;
    const int32_t token = job.tokens[row], type = job.types ? job.types[row] : 0;
    int16_t* out = job.stream + row * job.stride;
    target_->embed_row(word(token, memory), e.word_rescale.shift[token], e.word_rescale.multiplier[token], e.limit,
                       plan_.hidden, out);
    const int16_t *p = e.position + position(job, row) * width, *t = e.token_type + type * width;
    for (size_t i = 0; i < width; i++) out[i] = int16_t(clamp(int32_t(out[i]) + p[i] + t[i], e.limit));
  }
  int32_t position(const EmbedJob& job, int row) const {
    if (job.positions) return job.positions[row];
    const int32_t* after = std::upper_bound(job.starts, job.starts + job.sizes.sequences + 1, row);
    return plan_.embeddings.first_position + row - after[-1];
  }
  void embed(EmbedJob& job) {
    const Embeddings& e = plan_.embeddings;
    auto check = [](const char* what, int32_t id, int count) {
      if (id < 0 || id >= count)
        throw std::runtime_error(std::string(what) + " " + std::to_string(id) + " is outside of 0 to " +
                                 std::to_string(count - 1));
    };
    for (int row = 0; row < job.sizes.tokens; row++) {
      check("token", job.tokens[row], e.words);
      if (job.positions) check("position", job.positions[row], e.positions);
      if (job.types) check("type", job.types[row], e.types);
    }
    pool_.run(&pool_, embed_part, &job);
    if (job.failed) throw std::runtime_error("cannot read the plan's table of words any more: load it again");
  }

  void sums(const Block& matrix, const Wide& wide, void* narrow, size_t stride, int count, int columns,
            int32_t* out) {
    target_->sums(&pool_, (const Packed*)matrix.data(), narrow, stride, count, out, columns);
    for (int row = 0; row < count; row++)
      for (int i = 0; i < columns; i++) {
        int32_t& x = out[size_t(row) * columns + i];
        x = clamp((int64_t(x) * wide.multiplier[i] + (int64_t(1) << (wide.shift[i] - 1))) >> wide.shift[i], (1 << 24) - 1);
      }
  }
};

}  // namespace ibert
