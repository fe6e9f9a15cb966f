// The layer's forward pass: gather, up, activation, down, weighted combine, in two sweeps over the weights.
//
// Up: each thread takes blocks of an expert's hidden units, for all rows of the expert. Down: each takes blocks of
// model features, for all experts, so that it alone adds to its columns of the result: no atomics, and the same order
// of additions with any number of threads.
#pragma once
#include "activation.hpp"
#include "rows.hpp"

namespace moesaic::MOESAIC_VARIANT {

// Calls `work` with the activation's functions.
template <class Work>
INLINE void with_activation(int activation, const Work& work) {
  switch (activation) {
    case MOESAIC_SWIGLU:
      return work(Silu());
    case MOESAIC_GEGLU:
      return work(Gelu<true>());
    case MOESAIC_GEGLU_TANH:
      return work(GeluTanh<true>());
    case MOESAIC_RELU:
      return work(Relu());
    case MOESAIC_GELU:
      return work(Gelu<false>());
    default:
      return work(GeluTanh<false>());
  }
}

inline bool is_gated(int activation) { return activation <= MOESAIC_GEGLU_TANH; }

// The blocks of an up projection: W hidden units with their gates, or 2 W of them without.
inline int64_t hidden_units(bool gated) { return gated ? W : 2 * W; }

inline Block hidden_block(int64_t index, int64_t d_ff, bool gated) {
  const int64_t first = index * hidden_units(gated), second = gated ? d_ff + first : first + W;
  const int64_t left = d_ff - first, left_second = gated ? left : left - W;
  return {{first, second}, {int(left < W ? left : W), int(left_second < W ? left_second : W)}};
}

inline Block plain_block(int64_t index, int64_t outputs) { return hidden_block(index, outputs, false); }

template <class Format>
INLINE F bias_of(const void* bias, int64_t offset, int count) {
  if (!bias) return F{};
  return load_up_to(Format(), static_cast<const typename Format::Element*>(bias) + offset, count);
}

// From the sums of an up projection to hidden units; `pre` (or null) receives what goes into the activation.
template <class Kind, class Format, class Activation>
void activate(Activation, const MoesaicLayer& layer, int64_t expert, const Block& block, const int32_t* numbers,
              int rows, const float* sums, typename Kind::Element* hidden, int64_t stride) {
  constexpr bool gated = Activation::gated;
  const int64_t outputs = gated ? 2 * layer.d_ff : layer.d_ff;
  const F bias[2] = {bias_of<Format>(layer.up.bias, expert * outputs + block.first[0], block.count[0]),
                     bias_of<Format>(layer.up.bias, expert * outputs + block.first[1], block.count[1])};
  for (int r = 0; r < rows; ++r, sums += 2 * W, hidden += stride) {
    const F in[2] = {read<F>(sums) + bias[0], read<F>(sums + W) + bias[1]};
    if (layer.pre) {
      auto* pre = static_cast<typename Format::Element*>(layer.pre) + numbers[r] * outputs;
      for (int v = 0; v < 2; ++v) store_up_to(Format(), pre + block.first[v], in[v], block.count[v]);
    }
    if constexpr (gated) {
      store_up_to(typename Kind::Format(), hidden, Activation::value(in[0]) * in[1], block.count[0]);
    } else {
      store_up_to(typename Kind::Format(), hidden, Activation::value(in[0]), block.count[0]);
      store_up_to(typename Kind::Format(), hidden + W, Activation::value(in[1]), block.count[1]);
    }
    // The lane that the last unit shares must not hold a NaN.
    if (block.count[0] < W) {
      hidden[block.count[0]] = 0;
    } else if (!gated && block.count[1] >= 0 && block.count[1] < W) {
      hidden[W + block.count[1]] = 0;
    }
  }
}

// result[token[r]] += weight[r] * (sums[r] + bias) for the columns of one vector.
template <class Format>
INLINE void combine(const Block& block, const int32_t* tokens, const float* weights, int rows, const float* sums,
                    const F* bias, float* result, int64_t width) {
  for (int r = 0; r < rows; ++r, sums += 2 * W) {
    const F weight = splat(weights ? weights[r] : 1.0f);
    float* to = result + tokens[r] * width;
    for (int v = 0; v < 2; ++v) {
      const F value = read<F>(sums + v * W) + bias[v];
      const F before = load_up_to(F32(), to + block.first[v], block.count[v]);
      store_up_to(F32(), to + block.first[v], multiply_add(weight, value, before), block.count[v]);
    }
  }
}

// [T, D] sums in float32: the caller's own tensor where that is float32.
template <class Format>
struct Result {
  float* sums;
  typename Format::Element* out;
  int64_t tokens, width;
  static constexpr bool direct = sizeof(typename Format::Element) == 4;

  void plan(Arena& arena, void* to, int64_t num_tokens, int64_t features) {
    out = static_cast<typename Format::Element*>(to);
    tokens = num_tokens, width = features;
    sums = direct ? static_cast<float*>(to) : arena.take<float>(tokens * width);
  }
  void clear(int64_t begin, int64_t end) const {
    for (int64_t t = 0; t < tokens; ++t) memset(sums + t * width + begin, 0, size_t(end - begin) * 4);
  }
  void finish(int64_t begin, int64_t end) const {
    if (direct) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = begin; i < end; i += W)
        store_up_to(Format(), out + t * width + i, load_up_to(F32(), sums + t * width + i, end - i), end - i);
  }
};

template <class Kind, class Format>
struct Forward {
  typedef typename Kind::Element Element;
  const MoesaicLayer& layer;
  Rows rows;
  Features<Kind, Format> x;
  Scratch<Kind> hidden;
  Result<Format> result;
  const Element** x_rows;
  const Element** hidden_rows;
  Workspace* workspaces;
  Counter* counters;

  explicit Forward(const MoesaicLayer& of) : layer(of) {}

  int64_t group_rows() const {
    const int64_t most = GROUP_BYTES / (layer.d_ff * int64_t(sizeof(Element)) + 1);
    return most < 1 ? 1 : most;
  }

  void plan(Arena& arena, int64_t largest) {
    x.plan(arena, layer.x, layer.x_stride, layer.tokens, layer.d_model);
    hidden.plan(arena, largest, layer.d_ff);
    result.plan(arena, layer.out, layer.tokens, layer.d_model);
    x_rows = arena.take<const Element*>(layer.rows);
    hidden_rows = arena.take<const Element*>(largest);
    workspaces = arena.take<Workspace>(layer.threads);
    counters = arena.take<Counter>(1 + 2 * (layer.num_experts + 1));
  }

  // One thread's part.
  void work() {
    Workspace& workspace = workspaces[thread_number()];
    if (!x.direct) {
      for (int64_t token; (token = counters[0].next()) < layer.tokens;) x.convert(token);
#pragma omp barrier
    }
    Counter* counter = counters + 1;
    for (int32_t first = 0; first < rows.active || first == 0;) {
      const Group group = rows.active ? group_from(rows, first, group_rows()) : Group{};
      up(group, *counter++, workspace);
#pragma omp barrier
      down(group, first == 0, group.last == rows.active, *counter++, workspace);
#pragma omp barrier
      first = group.last;
      if (!rows.active) break;
    }
  }

  Matrix up_matrix(int32_t expert) const {
    return matrix_of(layer.up, expert, is_gated(layer.activation) ? 2 * layer.d_ff : layer.d_ff, layer.d_model);
  }
  Matrix down_matrix(int32_t expert) const { return matrix_of(layer.down, expert, layer.d_model, layer.d_ff); }

  void up(const Group& group, Counter& counter, Workspace& workspace) {
    const bool gated = is_gated(layer.activation);
    const int64_t units = hidden_units(gated), blocks = (layer.d_ff + units - 1) / units;
    const int64_t size = share(blocks * (group.last - group.first), layer.threads, 4);
    const int64_t shares = (blocks + size - 1) / size, items = shares * (group.last - group.first);
    auto expert_of = [&](int64_t item) { return rows.experts[group.first + item / shares]; };
    auto first_of = [&](int64_t item) { return hidden_block(item % shares * size, layer.d_ff, gated); };
    for_items(counter, items, [&](int64_t item, int64_t following) {
      const int32_t expert = expert_of(item);
      const int64_t from = item % shares * size, to = from + size < blocks ? from + size : blocks;
      for (int64_t b = from; b < to; ++b) {
        const Ahead ahead = b + 1 < to          ? ahead_of(up_matrix(expert), hidden_block(b + 1, layer.d_ff, gated))
                            : following < items ? ahead_of(up_matrix(expert_of(following)), first_of(following))
                                                : Ahead{};
        up_block(expert, hidden_block(b, layer.d_ff, gated), group, workspace, ahead);
      }
    });
  }

  void up_block(int32_t expert, const Block& block, const Group& group, Workspace& workspace, const Ahead& ahead) {
    const int32_t begin = rows.begin[expert];
    product<Kind>(up_matrix(expert), block, x_rows + begin, rows.count(expert), layer.d_model, layer.row_invariant,
                  workspace, ahead,
                  [&](int64_t r, int count, const float* sums) {
                    Element* to = hidden.row(begin + r - group.begin) + block.first[0];
                    with_activation(layer.activation, [&](auto activation) {
                      activate<Kind, Format>(activation, layer, expert, block, rows.number + begin + r, count, sums, to,
                                             hidden.stride);
                    });
                  });
  }

  void down(const Group& group, bool is_first, bool is_last, Counter& counter, Workspace& workspace) {
    const int64_t blocks = (layer.d_model + 2 * W - 1) / (2 * W), size = share(blocks, layer.threads, 8);
    for_items(counter, (blocks + size - 1) / size, [&](int64_t item, int64_t) {
      const int64_t from = item * size, to = from + size < blocks ? from + size : blocks;
      const int64_t begin = from * 2 * W, end = to * 2 * W < layer.d_model ? to * 2 * W : layer.d_model;
      if (is_first) result.clear(begin, end);
      for (int32_t a = group.first; a < group.last; ++a)
        for (int64_t b = from; b < to; ++b) {
          const int32_t next = b + 1 < to ? a : a + 1;
          const Ahead ahead = next < group.last ? ahead_of(down_matrix(rows.experts[next]),
                                                           plain_block(b + 1 < to ? b + 1 : from, layer.d_model))
                                                : Ahead{};
          down_block(rows.experts[a], plain_block(b, layer.d_model), group, workspace, ahead);
        }
      if (is_last) result.finish(begin, end);
    });
  }

  void down_block(int32_t expert, const Block& block, const Group& group, Workspace& workspace, const Ahead& ahead) {
    const int32_t begin = rows.begin[expert];
    F bias[2];
    for (int v = 0; v < 2; ++v)
      bias[v] = bias_of<Format>(layer.down.bias, expert * layer.d_model + block.first[v], block.count[v]);
    product<Kind>(down_matrix(expert), block, hidden_rows + begin - group.begin, rows.count(expert), layer.d_ff,
                  layer.row_invariant, workspace, ahead, [&](int64_t r, int count, const float* sums) {
                    combine<Format>(block, rows.token + begin + r, rows.weight + begin + r, count, sums, bias,
                                    result.sums, layer.d_model);
                  });
  }

  // After `rows` have been filled.
  int run() {
    const int64_t largest = largest_group(rows, group_rows());
    Arena arena = {nullptr, 0};
    plan(arena, largest);
    void* const scratch = borrow_scratch(arena.used);
    if (!scratch) return 1;
    arena = {static_cast<char*>(scratch), 0};
    plan(arena, largest);
    memset(counters, 0, sizeof(Counter) * size_t(1 + 2 * (layer.num_experts + 1)));
    for (int32_t n = 0; n < rows.begin[layer.num_experts]; ++n) x_rows[n] = x.row(rows.token[n]);
    for (int64_t n = 0; n < largest; ++n) hidden_rows[n] = hidden.row(n);
#pragma omp parallel num_threads(layer.threads)
    work();
    return_scratch(scratch);
    return 0;
  }
};

// Fills the rows of a call and lets `pass` run over them; 0, or 1 where memory ran out.
template <class Pass>
int over_rows(Pass&& pass) {
  Arena arena = {nullptr, 0};
  pass.rows.plan(arena, pass.layer);
  void* const scratch = borrow_scratch(arena.used);
  if (!scratch) return 1;
  arena = {static_cast<char*>(scratch), 0};
  pass.rows.plan(arena, pass.layer);
  pass.rows.fill(pass.layer);
  const int failed = pass.run();
  return_scratch(scratch);
  return failed;
}

}  // namespace moesaic::MOESAIC_VARIANT
