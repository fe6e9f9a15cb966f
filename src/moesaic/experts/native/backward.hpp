// The layer's backward pass, from what went into the activation in the forward pass.
//
// For the rows n of an expert, with routing weight w_n and the gradient dy of its token's output:
//   u = dy · down                 gradient of the hidden units, unweighted
//   dw_n = sum(u * h)             gradient of the routing weight, where h = activation(pre)
//   dpre = w_n * u * activation'(pre)
//   ddown = dy^T · (w h),  dup = dpre^T · x,  dx = sum over the token's rows of dpre · up
// One sweep for u, one for the rest. As in forward, what is added to is one thread's own.
#pragma once
#include "forward.hpp"

namespace moesaic::MOESAIC_VARIANT {

// From u to dpre (gated: both halves), w h, and this block's part of dw.
template <class Kind, class Format, class Activation>
void differentiate(Activation, const MoesaicLayer& layer, const Block& block, const int32_t* numbers,
                   const float* weights, int rows, const float* sums, typename Kind::Element* grad_pre,
                   int64_t pre_stride, typename Kind::Element* hidden, int64_t hidden_stride, float* parts,
                   int64_t parts_stride) {
  constexpr bool gated = Activation::gated;
  typedef typename Kind::Format Rounded;
  const int64_t d_ff = layer.d_ff, outputs = gated ? 2 * d_ff : d_ff;
  for (int r = 0; r < rows; ++r) {
    const auto* pre = static_cast<const typename Format::Element*>(layer.pre) + numbers[r] * outputs;
    auto* grad = grad_pre + r * pre_stride;
    const F weight = splat(weights[r]);
    F part = {};
    for (int v = 0; v < 2; ++v) {
      const int64_t at = block.first[v], count = block.count[v];
      if (count <= 0) continue;
      const F u = read<F>(sums + (2 * r + v) * W), weighted = weight * u;
      const Slope slope = Activation::slope(load_up_to(Format(), pre + at, count));
      F h = slope.value;
      if constexpr (gated) {
        const F up = load_up_to(Format(), pre + d_ff + at, count);
        store_up_to(Rounded(), grad + at, weighted * up * slope.derivative, count);
        store_up_to(Rounded(), grad + d_ff + at, weighted * slope.value, count);
        h *= up;
      } else {
        store_up_to(Rounded(), grad + at, weighted * slope.derivative, count);
        if (count < W) grad[at + count] = 0;  // the lane that the last unit shares
      }
      store_up_to(Rounded(), hidden + r * hidden_stride + at, weight * h, count);
      part += first_lanes(u * h, count);
    }
    parts[r * parts_stride] = sum(part);
  }
}

template <class Kind, class Format>
struct Backward {
  typedef typename Kind::Element Element;
  const MoesaicLayer& layer;
  const MoesaicGradients& gradients;
  Rows rows;
  Features<Kind, Format> x, grad_out;
  Scratch<Kind> grad_pre, hidden;
  Result<Format> grad_x;
  const Element** x_rows;
  const Element** grad_rows;
  const Element** grad_pre_rows;
  const Element** hidden_rows;
  float* parts;  // [rows of a group, blocks of hidden units] of the routing weights' gradients
  Workspace* workspaces;
  char* lanes;
  int64_t lanes_size;
  Counter* counters;

  Backward(const MoesaicLayer& of, const MoesaicGradients& to) : layer(of), gradients(to) {}

  bool gated() const { return is_gated(layer.activation); }
  int64_t outputs() const { return gated() ? 2 * layer.d_ff : layer.d_ff; }
  int64_t hidden_blocks() const { return (layer.d_ff + 2 * W - 1) / (2 * W); }
  int64_t group_rows() const {
    const int64_t most = GROUP_BYTES / ((outputs() + layer.d_ff) * int64_t(sizeof(Element)) + 1);
    return most < 1 ? 1 : most;
  }
  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t e = 0; e < layer.num_experts; ++e) most = rows.count(e) > most ? rows.count(e) : most;
    return most;
  }

  void plan(Arena& arena, int64_t largest, int64_t most) {
    x.plan(arena, layer.x, layer.x_stride, layer.tokens, layer.d_model);
    grad_out.plan(arena, gradients.grad_out, layer.d_model, layer.tokens, layer.d_model);
    grad_pre.plan(arena, largest, outputs());
    hidden.plan(arena, largest, layer.d_ff);
    grad_x.plan(arena, gradients.x, layer.tokens, layer.d_model);
    x_rows = arena.take<const Element*>(layer.rows);
    grad_rows = arena.take<const Element*>(layer.rows);
    grad_pre_rows = arena.take<const Element*>(largest);
    hidden_rows = arena.take<const Element*>(largest);
    parts = arena.take<float>(largest * hidden_blocks());
    workspaces = arena.take<Workspace>(layer.threads);
    lanes_size = steps_of(most, Kind::pack) * BLOCK_ROWS * 4 + 128;
    lanes = arena.take<char>(lanes_size * layer.threads);
    counters = arena.take<Counter>(num_counters());
  }

  static constexpr int COUNTERS = 6;  // of a group
  int64_t num_counters() const { return 3 + COUNTERS * (layer.num_experts + 1); }

  int run() {
    const int64_t largest = largest_group(rows, group_rows()), most = most_rows();
    Arena arena = {nullptr, 0};
    plan(arena, largest, most);
    void* const scratch = borrow_scratch(arena.used);
    if (!scratch) return 1;
    arena = {static_cast<char*>(scratch), 0};
    plan(arena, largest, most);
    memset(counters, 0, sizeof(Counter) * size_t(num_counters()));
    for (int32_t n = 0; n < rows.begin[layer.num_experts]; ++n) {
      x_rows[n] = x.row(rows.token[n]);
      grad_rows[n] = grad_out.row(rows.token[n]);
    }
    for (int64_t n = 0; n < largest; ++n) {
      grad_pre_rows[n] = grad_pre.row(n);
      hidden_rows[n] = hidden.row(n);
    }
    if (gradients.weights) memset(gradients.weights, 0, size_t(layer.tokens * layer.top_k) * 4);
#pragma omp parallel num_threads(layer.threads)
    work();
    return_scratch(scratch);
    return 0;
  }

  // One thread's part.
  void work() {
    Workspace& workspace = workspaces[thread_number()];
    for (int64_t token; (token = counters[0].next()) < layer.tokens;) {
      x.convert(token);
      grad_out.convert(token);
    }
    for (int64_t expert; (expert = counters[1].next()) < layer.num_experts;)
      if (!rows.count(expert)) clear_expert(expert);
    if (gradients.x && !rows.active)
      for (int64_t item; (item = counters[2].next()) < 1;) {
        grad_x.clear(0, layer.d_model);
        grad_x.finish(0, layer.d_model);
      }
#pragma omp barrier
    Counter* counter = counters + 3;
    for (int32_t first = 0; first < rows.active; counter += COUNTERS) {
      const Group group = group_from(rows, first, group_rows());
      hidden_gradients(group, counter[0], workspace);
#pragma omp barrier
      if (gradients.x) input_gradients(group, first == 0, group.last == rows.active, counter[1], workspace);
      if (gradients.down) down_gradients(group, counter[2], workspace);
      if (gradients.up) up_gradients(group, counter[3], workspace);
      if (gradients.weights) weight_gradients(group, counter[4]);
      bias_gradients(group, counter[5]);
#pragma omp barrier
      first = group.last;
    }
  }

  void clear_expert(int64_t expert) const {
    const int64_t size = sizeof(typename Format::Element);
    auto clear = [&](void* gradient, int64_t elements) {
      if (gradient) memset(static_cast<char*>(gradient) + expert * elements * size, 0, size_t(elements * size));
    };
    clear(gradients.up, outputs() * layer.d_model);
    clear(gradients.down, layer.d_model * layer.d_ff);
    clear(gradients.up_bias, outputs());
    clear(gradients.down_bias, layer.d_model);
  }

  void hidden_gradients(const Group& group, Counter& counter, Workspace& workspace) {
    const int64_t blocks = hidden_blocks(), experts = group.last - group.first;
    const int64_t size = share(blocks * experts, layer.threads, 4), shares = (blocks + size - 1) / size;
    for (int64_t item; (item = counter.next()) < shares * experts;) {
      const int32_t expert = rows.experts[group.first + item / shares], begin = rows.begin[expert];
      const int64_t from = item % shares * size, to = from + size < blocks ? from + size : blocks;
      const Matrix down = transposed(matrix_of(layer.down, expert, layer.d_model, layer.d_ff));
      for (int64_t b = from; b < to; ++b) {
        const Block block = plain_block(b, layer.d_ff);
        product<Kind>(down, block, grad_rows + begin, rows.count(expert), layer.d_model, false, workspace, Ahead{},
                      [&](int64_t r, int count, const float* sums) {
                        const int64_t n = begin + r - group.begin;
                        with_activation(layer.activation, [&](auto activation) {
                          differentiate<Kind, Format>(activation, layer, block, rows.number + begin + r,
                                                      rows.weight + begin + r, count, sums, grad_pre.row(n),
                                                      grad_pre.stride, hidden.row(n), hidden.stride,
                                                      parts + n * blocks + b, blocks);
                        });
                      });
      }
    }
  }

  void input_gradients(const Group& group, bool is_first, bool is_last, Counter& counter, Workspace& workspace) {
    const int64_t blocks = (layer.d_model + 2 * W - 1) / (2 * W), size = share(blocks, layer.threads, 8);
    const F no_bias[2] = {};
    for (int64_t item; (item = counter.next()) * size < blocks;) {
      const int64_t from = item * size, to = from + size < blocks ? from + size : blocks;
      const int64_t begin = from * 2 * W, end = to * 2 * W < layer.d_model ? to * 2 * W : layer.d_model;
      if (is_first) grad_x.clear(begin, end);
      for (int32_t a = group.first; a < group.last; ++a) {
        const int32_t expert = rows.experts[a], row = rows.begin[expert];
        const Matrix up = transposed(matrix_of(layer.up, expert, outputs(), layer.d_model));
        for (int64_t b = from; b < to; ++b) {
          const Block block = plain_block(b, layer.d_model);
          product<Kind>(up, block, grad_pre_rows + row - group.begin, rows.count(expert), outputs(), false, workspace, Ahead{},
                        [&](int64_t r, int count, const float* sums) {
                          combine<Format>(block, rows.token + row + r, nullptr, count, sums, no_bias, grad_x.sums,
                                          layer.d_model);
                        });
        }
      }
      if (is_last) grad_x.finish(begin, end);
    }
  }

  void up_gradients(const Group& group, Counter& counter, Workspace& workspace) {
    const bool natural = layer.up.in_stride == 1;
    outer_products(group, counter, workspace, natural ? grad_pre_rows - group.begin : x_rows,
                   natural ? outputs() : layer.d_model, natural ? x_rows : grad_pre_rows - group.begin,
                   natural ? layer.d_model : outputs(), gradients.up);
  }

  void down_gradients(const Group& group, Counter& counter, Workspace& workspace) {
    const bool natural = layer.down.in_stride == 1;
    outer_products(group, counter, workspace, natural ? grad_rows : hidden_rows - group.begin,
                   natural ? layer.d_model : layer.d_ff, natural ? hidden_rows - group.begin : grad_rows,
                   natural ? layer.d_ff : layer.d_model, gradients.down);
  }

  // For each expert of the group, the sum over its rows of the outer products of `left` and `right`: [height, width].
  void outer_products(const Group& group, Counter& counter, Workspace& workspace, const Element* const* left,
                      int64_t height, const Element* const* right, int64_t width, void* gradient) {
    const int64_t shares = (height + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t item; (item = counter.next()) < shares * (group.last - group.first);) {
      const int32_t expert = rows.experts[group.first + item / shares], begin = rows.begin[expert];
      const int64_t from = item % shares * BLOCK_ROWS, to = from + BLOCK_ROWS < height ? from + BLOCK_ROWS : height;
      auto* out = static_cast<typename Format::Element*>(gradient) + (expert * height + from) * width;
      outer_product(left + begin, from, to - from, right + begin, width, rows.count(expert), workspace, out);
    }
  }

  void outer_product(const Element* const* left, int64_t first, int64_t height, const Element* const* right,
                     int64_t width, int64_t num_rows, Workspace& workspace, typename Format::Element* out) {
    uint32_t* const packed = reinterpret_cast<uint32_t*>(lanes + lanes_size * thread_number());
    for (int64_t i = 0; i < height; i += W)
      pack_inputs<Kind, typename Kind::Format>([&](int64_t k) { return left[k] + first + i; }, height - i, 0, num_rows,
                                               packed + i, BLOCK_ROWS);
    for (int64_t b = 0; b * 2 * W < width; ++b) {
      const Block block = plain_block(b, width);
      panel_lanes<Kind>(packed, BLOCK_ROWS, int(height), right, block, num_rows, workspace);
      const float* sums = workspace.sums;
      if (is_whole(block)) {
        for (int64_t r = 0; r < height; ++r, sums += 2 * W)
          store_pair(Format(), out + r * width + block.first[0], read<F>(sums), read<F>(sums + W));
        continue;
      }
      for (int64_t r = 0; r < height; ++r)
        for (int v = 0; v < 2; ++v)
          store_up_to(Format(), out + r * width + block.first[v], read<F>(workspace.sums + (2 * r + v) * W),
                      block.count[v]);
    }
  }

  void weight_gradients(const Group& group, Counter& counter) const {
    constexpr int64_t size = 64;  // rows at once
    const int64_t blocks = hidden_blocks();
    for (int64_t item; (item = counter.next()) * size < group.end - group.begin;) {
      const int64_t last = (item + 1) * size < group.end - group.begin ? (item + 1) * size : group.end - group.begin;
      int32_t expert = expert_of(group, group.begin + item * size);
      for (int64_t n = item * size; n < last; ++n) {
        while (group.begin + n >= rows.begin[expert + 1]) ++expert;
        float total = 0;
        for (int64_t b = 0; b < blocks; ++b) total += parts[n * blocks + b];
        if (layer.down.bias) total += with_bias(expert, group.begin + n);
        static_cast<float*>(gradients.weights)[rows.slot[group.begin + n]] = total;
      }
    }
  }

  int32_t expert_of(const Group& group, int64_t row) const {
    int32_t expert = rows.experts[group.first];
    while (row >= rows.begin[expert + 1]) ++expert;
    return expert;
  }

  float with_bias(int32_t expert, int64_t row) const {
    F total = {};
    for (int64_t i = 0; i < layer.d_model; i += W) {
      const int count = layer.d_model - i < W ? int(layer.d_model - i) : W;
      total += bias_of<Format>(layer.down.bias, expert * layer.d_model + i, count) *
               load_up_to(typename Kind::Format(), grad_rows[row] + i, count);
    }
    return sum(total);
  }

  void bias_gradients(const Group& group, Counter& counter) const {
    if (!gradients.up_bias && !gradients.down_bias) return;
    for (int64_t item; (item = counter.next()) < group.last - group.first;) {
      const int32_t expert = rows.experts[group.first + item];
      if (gradients.up_bias) sum_rows(expert, grad_pre_rows - group.begin, nullptr, outputs(), gradients.up_bias);
      if (gradients.down_bias) sum_rows(expert, grad_rows, rows.weight, layer.d_model, gradients.down_bias);
    }
  }

  void sum_rows(int32_t expert, const Element* const* of, const float* weights, int64_t width, void* gradient) const {
    auto* out = static_cast<typename Format::Element*>(gradient) + expert * width;
    for (int64_t i = 0; i < width; i += W) {
      F total = {};
      for (int32_t n = rows.begin[expert]; n < rows.begin[expert + 1]; ++n)
        total = multiply_add(splat(weights ? weights[n] : 1.0f),
                             load_up_to(typename Kind::Format(), of[n] + i, width - i), total);
      store_up_to(Format(), out + i, total, width - i);
    }
  }
};

}  // namespace moesaic::MOESAIC_VARIANT
