// SPDX-License-Identifier: Apache-2.0
// Packed weights, and products with what follows them fused: each tile of sums is used while it is in the first cache.
#pragma once

// In memory: the header, then of every panel (NR columns each) the sums' start, shifts, shifts to the left, bounds of
// what is shifted to the left (int32 [NR] each, in the order of a panel), then multipliers (int16, natural order), then
// the weights of all panels.
struct PackedHeader {
  int rows, depth, padded_depth, panels;
  bool left;  // some shift is negative: the general path
  int taken, limit;  // how rows of activations are to be divided; a limit of 0: not at all
};
struct PanelConstants {
  int32_t start[NR], shift[NR], left[NR], bound[NR];
  int16_t multiplier[NR];
};
static inline size_t constants_offset(int p) { return 64 + p * rounded_up(sizeof(PanelConstants), 64); }
static inline size_t weights_offset(const PackedHeader& h) { return constants_offset(h.panels); }

static size_t packed_bytes(const Matrix& m) {
  size_t panels = rounded_up(m.rows, NR) / NR;
  return constants_offset(int(panels)) + panels * NR * rounded_up(m.depth, K_STEP);
}

// A column of a panel. Within K_STEP its groups have the same distance.
static void pack_column(const int8_t* row, int depth, int p, int8_t* panel) {
  constexpr int G = Products::G;
  int k = 0;
  for (; k + K_STEP <= depth; k += K_STEP) {
    int8_t* to = panel + Products::place(k, p);
    const size_t step = Products::place(k + G, p) - Products::place(k, p);
    for (int i = 0; i < K_STEP; i += G, to += step) std::memcpy(to, row + k + i, G);
  }
  for (; k < depth; k++) panel[Products::place(k, p)] = row[k];
}

// Into memory of zeros.
static void pack(const Matrix& m, const Rescale* rescale, int zero_of_input, uint8_t* memory) {
  PackedHeader h;
  std::memset(&h, 0, sizeof h);
  h.rows = m.rows;
  h.depth = m.depth;
  h.padded_depth = int(rounded_up(m.depth, K_STEP));
  h.panels = int(rounded_up(m.rows, NR) / NR);
  for (int n = 0; rescale && n < m.rows; n++) h.left |= rescale->shift[n] < 0;
#if defined(TARGET_AVX2)
  int most = 1;
  for (size_t i = 0, count = size_t(m.rows) * m.depth; i < count; i++) {
    const int size = m.weight[i] < 0 ? -m.weight[i] : m.weight[i];
    most = size > most ? size : most;
  }
  if (2 * 255 * most > 32767) {
    h.limit = 32767 / most;
    h.taken = zero_of_input == Products::ZERO ? Products::TAKEN : 0;
    zero_of_input -= h.taken;
  }
#endif
  std::memcpy(memory, &h, sizeof h);
  const size_t panel_bytes = size_t(NR) * h.padded_depth;
  for (int panel = 0; panel < h.panels; panel++) {
    PanelConstants c;
    std::memset(&c, 0, sizeof c);
    auto* weights = (int8_t*)memory + weights_offset(h) + panel * panel_bytes;
    for (int p = 0; p < NR; p++) {
      const int n = panel * NR + column(p);
      c.bound[p] = 0x7fffffff;
      if (n >= m.rows) continue;
      const int8_t* row = m.weight + size_t(n) * m.depth;
      pack_column(row, m.depth, p, weights);
      uint32_t sum = 0;
      for (int k = 0; k < m.depth; k++) sum += uint32_t(int32_t(row[k]));
      uint32_t start = uint32_t(m.bias[n]) - uint32_t(zero_of_input) * sum;
      if (rescale) {
        const int shift = rescale->shift[n];
        c.shift[p] = shift > 0 ? shift : 0;
        if (shift > 0) start += uint32_t(1) << (shift - 1);
        if (shift < 0) c.left[p] = -shift, c.bound[p] = 32767;
        c.multiplier[column(p)] = rescale->multiplier[n];
      }
      c.start[p] = int32_t(start);
    }
    std::memcpy(memory + constants_offset(panel), &c, sizeof c);
  }
}

static inline const PackedHeader& header(const Packed* m) { return *(const PackedHeader*)m; }
static inline const PanelConstants& constants(const Packed* m, int panel) {
  return *(const PanelConstants*)((const uint8_t*)m + constants_offset(panel));
}
static inline const int8_t* panel_weights(const Packed* m, int panel) {
  const PackedHeader& h = header(m);
  return (const int8_t*)m + weights_offset(h) + size_t(panel) * NR * h.padded_depth;
}

// A row of sums to 16 bits: rq with the shift and multiplier of each column.
template <bool LEFT>
static inline V rescaled_row(const int32_t* sums, const PanelConstants& c) {
  const int half = NR / 2;
  V lo = S::load(sums), hi = S::load(sums + half);
  if constexpr (LEFT) {
    auto apply = [&](V v, int at) {
      V bound = S::load(c.bound + at);
      v = S::max32(S::min32(v, bound), S::sub32(S::zero(), bound));
      return S::sllv32(v, S::load(c.left + at));
    };
    lo = apply(lo, 0);
    hi = apply(hi, half);
  }
  lo = S::srav32(lo, S::load(c.shift));
  hi = S::srav32(hi, S::load(c.shift + half));
  return S::mul(S::packs32(lo, hi), S::load(c.multiplier));
}

static inline int next_unit(int* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// Calls each(row) for all rows, divided over the threads.
template <class F>
struct RowsJob {
  const F* each;
  int rows, counter;
  static void part(void* argument, int) {
    auto* job = static_cast<RowsJob*>(argument);
    constexpr int STEP = 8;
    for (int u = next_unit(&job->counter); u * STEP < job->rows; u = next_unit(&job->counter)) {
      const int end = u * STEP + STEP < job->rows ? u * STEP + STEP : job->rows;
      for (int row = u * STEP; row < end; row++) (*job->each)(row);
    }
  }
};
template <class F>
static void for_rows(Pool* pool, int rows, const F& each) {
  RowsJob<F> job = {&each, rows, 0};
  pool->run(pool, RowsJob<F>::part, &job);
}

// Rows of activations times packed weights. `finish(panel, row, 16-bit results)`, or with RAW `finish(panel, row, sums)`.
template <bool RAW, class F>
struct MultiplyJob {
  void* in;
  size_t stride;
  int rows;
  const Packed* matrix;
  const F* finish;
  int row_block, panel_block, units, counter;

  template <bool LEFT>
  void unit(int u) const {
    const PackedHeader& h = header(matrix);
    const int panel_blocks = (h.panels + panel_block - 1) / panel_block;
    const int first_row = u / panel_blocks * row_block, first_panel = u % panel_blocks * panel_block;
    const int end_row = first_row + row_block < rows ? first_row + row_block : rows;
    const int end_panel = first_panel + panel_block < h.panels ? first_panel + panel_block : h.panels;
    // A panel has NR lines for 64 of the inner dimension; the tiles above each other fetch the next one in turn.
    const int tiles = (end_row - first_row + Products::MR - 1) / Products::MR, lines = (NR + tiles - 1) / tiles;
    const size_t panel_bytes = size_t(NR) * h.padded_depth;
    const F own = *finish;  // a copy, which no store can alias
    alignas(64) int32_t sums[2][Products::MR * NR];
    // A tile whose sums are there, to be finished while the next is multiplied.
    struct {
      const int32_t* sums;
      const PanelConstants* constants;
      int panel, row, left;
    } ready = {nullptr, nullptr, 0, 0, 0};
    auto finish_rows = [&](int count) {
      for (; count > 0 && ready.left > 0; count--, ready.left--, ready.row++, ready.sums += NR) {
        if constexpr (RAW)
          own(ready.panel, ready.row, ready.sums);
        else
          own(ready.panel, ready.row, rescaled_row<LEFT>(ready.sums, *ready.constants));
      }
    };
    int turn = 0;
    for (int panel = first_panel; panel < end_panel; panel++) {
      const PanelConstants& c = constants(matrix, panel);
      const int8_t* weights = panel_weights(matrix, panel);
      // Prefetching beyond the last panel is harmless.
      Ahead ahead = {weights + panel_bytes, lines};
      for (int row = first_row; row < end_row; row += Products::MR, ahead.at += size_t(lines) * h.padded_depth) {
        const int count = end_row - row < Products::MR ? end_row - row : Products::MR;
        const Activation* a = activations(in, stride, row);
        const size_t lda = stride * Products::ROOM;
#if defined(TARGET_AMX)
        const int steps = h.padded_depth / K_STEP, each = (Products::MR + steps - 1) / steps;
        Products::tile(a, lda, count, weights, h.padded_depth, c.start, sums[turn], NR, ahead,
                       [&] { finish_rows(each); });
        finish_rows(Products::MR);
#else
        Products::tile(a, lda, count, weights, h.padded_depth, c.start, sums[turn], NR, ahead);
#endif
#if defined(TARGET_AVX2)
        if (h.limit) Products::add_rests(a, lda, count, weights, sums[turn]);
#endif
        ready = {sums[turn], &c, panel, row, count};
#if defined(TARGET_AMX)
        turn ^= 1;
#else
        finish_rows(count);
#endif
      }
    }
    finish_rows(Products::MR);
  }
  static void part(void* argument, int) {
    auto* job = static_cast<MultiplyJob*>(argument);
    TileScope scope;
    const bool left = header(job->matrix).left;
    for (int u = next_unit(&job->counter); u < job->units; u = next_unit(&job->counter)) {
      if (left)
        job->template unit<true>(u);
      else
        job->template unit<false>(u);
    }
  }
};

// Bytes of a block of activations that is to stay in the second cache.
static constexpr size_t BLOCK_BYTES = 384 * 1024;

// Activations are there for one product: they may be divided in place.
template <bool RAW, class F>
static void multiply(Pool* pool, const Packed* matrix, void* in, size_t stride, int rows, const F& finish) {
  const PackedHeader& h = header(matrix);
#if defined(TARGET_AVX2)
  if (h.limit)
    for_rows(pool, rows, [=, &h](int row) {
      Products::divide(activations(in, stride, row), stride, h.padded_depth, h.taken, h.limit);
    });
#endif
  MultiplyJob<RAW, F> job = {in, stride, rows, matrix, &finish, 0, 0, 0, 0};
  size_t fitting = BLOCK_BYTES / (size_t(h.padded_depth) * sizeof(Activation)) / Products::MR * Products::MR;
  if (fitting < Products::MR) fitting = Products::MR;
  // Blocks of about equal size, each a whole number of tiles.
  const size_t blocks = (rows + fitting - 1) / fitting;
  job.row_block = int(rounded_up((rows + blocks - 1) / blocks, Products::MR));
  job.panel_block = h.panels;
  const int row_blocks = (rows + job.row_block - 1) / job.row_block;
  if (pool->threads > 1) {
    int wanted = (4 * pool->threads + row_blocks - 1) / row_blocks;
    job.panel_block = h.panels > wanted ? (h.panels + wanted - 1) / wanted : 1;
  }
  job.units = row_blocks * ((h.panels + job.panel_block - 1) / job.panel_block);
  pool->run(pool, MultiplyJob<RAW, F>::part, &job);
}

static void sums(Pool* pool, const Packed* matrix, void* in, size_t in_stride, int rows, int32_t* out,
                 size_t out_stride) {
  const int columns = header(matrix).rows;
  auto finish = [=](int panel, int row, const int32_t* from) {
    for (int p = 0; p < NR; p++) {
      const int n = panel * NR + column(p);
      if (n < columns) out[row * out_stride + n] = from[p];
    }
  };
  multiply<true>(pool, matrix, in, in_stride, rows, finish);
}

static void rescaled(Pool* pool, const Packed* matrix, void* in, size_t in_stride, int rows, int16_t* out,
                     size_t out_stride) {
  auto finish = [=](int panel, int row, V v) { S::store(out + row * out_stride + panel * NR, v); };
  multiply<false>(pool, matrix, in, in_stride, rows, finish);
}
