// Causal attention over a paged cache. Every row goes through its keys a page at a time, from the first one on, with a
// running maximum (Online normalizer calculation for softmax, algorithm 3): what it adds up, and in which order, follows
// from its position alone.
#pragma once
#include "activation.hpp"
#include "team.hpp"

namespace moesaic::MOESAIC_VARIANT {

constexpr int PAGE = MOESAIC_PAGE;
constexpr int PAGE_VECTORS = PAGE / W;
constexpr int TOGETHER = W == 16 ? 4 : 1;  // states whose sums fit the registers together
constexpr int MOST_STATES = 64;  // rows times heads that go through a page together

// The running softmax of one row and head.
struct State {
  float largest, total;
  int64_t from, position;  // keys that it sees: from, ..., position
  const float* query;      // [key_width]
  float* sum;              // [value_width], rounded up to whole vectors
};

// Where the page that follows lies, of which a little is fetched at every step.
struct PageAhead {
  const char *keys, *values;
};

template <class Format>
struct Attention {
  typedef typename Format::Element Element;
  static constexpr bool direct = sizeof(Element) == 4;  // pages are read as they are, else copied as floats first
  const MoesaicAttention& a;
  const int64_t group, rows_at_once, most_states, value_room;
  int64_t* first_item;  // [S + 1]
  Counter* counters;
  State* states;      // all from here on: a part for each thread
  float* queries;
  float* sums;
  float* page;

  explicit Attention(const MoesaicAttention& of)
      : a(of),
        group(of.heads / of.kv_heads),
        rows_at_once(MOST_STATES / group > 1 ? MOST_STATES / group : 1),
        most_states(rows_at_once * group),
        value_room((of.value_width + W - 1) / W * W) {}

  int64_t page_floats() const { return direct ? 0 : PAGE * (a.key_width + value_room); }

  void plan(Arena& arena) {
    first_item = arena.take<int64_t>(a.sequences + 1);
    counters = arena.take<Counter>(2);
    states = arena.take<State>(a.threads * most_states);
    queries = arena.take<float>(a.threads * most_states * a.key_width);
    sums = arena.take<float>(a.threads * most_states * value_room);
    page = arena.take<float>(a.threads * page_floats());
  }

  // One thread's part.
  void work() {
    for (int64_t token; (token = counters[0].next()) < a.tokens;) store_token(token);
#pragma omp barrier
    const int64_t thread = thread_number();
    const Attention mine = part_of(thread);
    int64_t sequence = 0;
    for (int64_t item; (item = counters[1].next()) < first_item[a.sequences];) {
      while (item >= first_item[sequence + 1]) ++sequence;  // items come in order
      mine.attend(sequence, item - first_item[sequence]);
    }
  }

  Attention part_of(int64_t thread) const {
    Attention part = *this;
    part.states += thread * most_states;
    part.queries += thread * most_states * a.key_width;
    part.sums += thread * most_states * value_room;
    part.page += thread * page_floats();
    return part;
  }

  Element* key_page(int64_t number, int64_t head) const {
    return static_cast<Element*>(a.key_pool) + (number * a.kv_heads + head) * a.key_width * PAGE;
  }
  Element* value_page(int64_t number, int64_t head) const {
    return static_cast<Element*>(a.value_pool) + (number * a.kv_heads + head) * PAGE * a.value_width;
  }

  void store_token(int64_t token) const {
    const int64_t slot = a.slots[token];
    if (slot < 0) return;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const auto* key = static_cast<const Element*>(a.keys) + token * a.key_strides[0] + head * a.key_strides[1];
      const auto* value =
          static_cast<const Element*>(a.values) + token * a.value_strides[0] + head * a.value_strides[1];
      Element* to = key_page(slot / PAGE, head) + slot % PAGE;
      for (int64_t k = 0; k < a.key_width; ++k) to[k * PAGE] = key[k];
      memcpy(value_page(slot / PAGE, head) + slot % PAGE * a.value_width, value,
             size_t(a.value_width) * sizeof(Element));
    }
  }

  // Some rows of a sequence, for the heads that share a head of keys.
  void attend(int64_t sequence, int64_t item) const {
    const int64_t head = item % a.kv_heads, first = a.starts[sequence], rows = a.starts[sequence + 1] - first;
    const int64_t begin = item / a.kv_heads * rows_at_once;
    const int64_t end = begin + rows_at_once < rows ? begin + rows_at_once : rows;
    const int64_t before = a.contexts[sequence] - rows;  // keys of earlier calls
    int count = 0;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < group; ++g) begin_state(count++, first + r, head * group + g, before + r);
    const int32_t* const pages = a.tables + sequence * a.table_width;
    const int64_t last = (before + end - 1) / PAGE;
    for (int64_t p = states[0].from / PAGE; p <= last; ++p)
      through_page(pages[p], pages[p < last ? p + 1 : p], p * PAGE, head, count);
    count = 0;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < group; ++g) finish(states[count++], first + r, head * group + g);
  }

  void begin_state(int index, int64_t token, int64_t head, int64_t position) const {
    State& state = states[index];
    state.largest = a.sinks ? a.sinks[head] : -__builtin_inff();
    state.total = a.sinks ? 1.0f : 0.0f;
    state.position = position;
    state.from = a.window && position >= a.window ? position - a.window + 1 : 0;
    float* query = queries + index * a.key_width;
    const auto* from = static_cast<const Element*>(a.query) + token * a.query_strides[0] + head * a.query_strides[1];
    for (int64_t k = 0; k < a.key_width; k += W)
      store_up_to(F32(), query + k, load_up_to(Format(), from + k, a.key_width - k), a.key_width - k);
    state.query = query;
    state.sum = sums + index * value_room;
    memset(state.sum, 0, size_t(value_room) * 4);
  }

  // Keys key, ..., key + PAGE - 1, which lie in page `number`, for the states that see any of them; page `next` is
  // fetched meanwhile.
  void through_page(int64_t number, int64_t next, int64_t key, int64_t head, int count) const {
    const Element* keys = key_page(number, head);
    const Element* values = value_page(number, head);
    const PageAhead ahead = {reinterpret_cast<const char*>(key_page(next, head)),
                         reinterpret_cast<const char*>(value_page(next, head))};
    if (direct || count == 1) return through_keys<Format>(key, count, keys, values, a.value_width, ahead);
    float *const float_keys = page, *const float_values = page + PAGE * a.key_width;
    for (int64_t i = 0; i < a.key_width * PAGE; i += W) {
      __builtin_prefetch(ahead.keys + i * int64_t(sizeof(Element)));
      store(F32(), float_keys + i, load(Format(), keys + i));
    }
    for (int64_t j = 0; j < PAGE; ++j)
      for (int64_t i = 0; i < a.value_width; i += W) {
        __builtin_prefetch(ahead.values + (j * a.value_width + i) * int64_t(sizeof(Element)));
        store(F32(), float_values + j * value_room + i,
              load_up_to(Format(), values + j * a.value_width + i, a.value_width - i));
      }
    const PageAhead nothing = {reinterpret_cast<const char*>(keys), reinterpret_cast<const char*>(values)};
    through_keys<F32>(key, count, float_keys, float_values, value_room, nothing);
  }

  template <class Stored>
  void through_keys(int64_t key, int count, const typename Stored::Element* keys,
                    const typename Stored::Element* values, int64_t value_stride, const PageAhead& ahead) const {
    for (int s = 0; s < count;) {
      if (s + TOGETHER <= count && sees_all(s, key)) {
        step<Stored, TOGETHER>(states + s, 0, PAGE, keys, values, value_stride, ahead);
        s += TOGETHER;
        continue;
      }
      const int64_t from = states[s].from - key, to = states[s].position - key + 1;
      if (to > 0 && from < PAGE)
        step<Stored, 1>(states + s, from > 0 ? int(from) : 0, to < PAGE ? int(to) : PAGE, keys, values, value_stride,
                        ahead);
      ++s;
    }
  }

  // Whether TOGETHER states from `first` on see the whole page of `key`. (States come in the order of their positions.)
  bool sees_all(int first, int64_t key) const {
    return states[first + TOGETHER - 1].from <= key && states[first].position >= key + PAGE - 1;
  }

  // M states that see the same keys of the page, from `from` to before `to`.
  template <class Stored, int M>
  void step(State* of, int from, int to, const typename Stored::Element* keys, const typename Stored::Element* values,
            int64_t value_stride, const PageAhead& ahead) const {
    float weights[M][PAGE], kept[M];
    logits<Stored, M>(of, keys, weights, ahead.keys);
    for (int m = 0; m < M; ++m) kept[m] = softmax_step(of[m], weights[m], from, to);
    add_values<Stored, M>(of, kept, weights, from, to, values, value_stride, ahead.values);
  }

  // From logits to weights, zero where nothing is seen; returns what the sums so far are to be multiplied by.
  static float softmax_step(State& state, float* weights, int from, int to) {
    float largest = state.largest;
    for (int j = from; j < to; ++j) largest = weights[j] > largest ? weights[j] : largest;
    F added = {};
    for (int v = 0; v < PAGE_VECTORS; ++v) {
      F weight = exponential(read<F>(weights + v * W) - splat(largest));
      if (to - from < PAGE) {
        float lanes[W];
        store(F32(), lanes, weight);
        for (int j = 0; j < W; ++j)
          if (v * W + j < from || v * W + j >= to) lanes[j] = 0;
        weight = read<F>(lanes);
      }
      store(F32(), weights + v * W, weight);
      added += weight;
    }
    // Where the maximum stays, this is 1 exactly.
    const float kept = exponential(splat(state.largest - largest))[0];
    state.total = state.total * kept + sum(added);
    state.largest = largest;
    return kept;
  }

  template <class Stored, int M>
  void logits(const State* of, const typename Stored::Element* keys, float (*to)[PAGE], const char* ahead) const {
    constexpr int CHAINS = 4;
    constexpr int BYTES = CHAINS * PAGE * int(sizeof(typename Stored::Element));
    const float* query[M];
    for (int m = 0; m < M; ++m) query[m] = of[m].query;
    F part[M][CHAINS][PAGE_VECTORS] = {};
    int64_t k = 0;
    for (; k + CHAINS <= a.key_width; k += CHAINS, ahead += BYTES) {
#pragma GCC unroll 4
      for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < PAGE_VECTORS; ++v) {
          const F key = load(Stored(), keys + (k + c) * PAGE + v * W);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) part[m][c][v] = multiply_add(splat(query[m][k + c]), key, part[m][c][v]);
        }
    }
    for (; k < a.key_width; ++k)
      for (int v = 0; v < PAGE_VECTORS; ++v)
        for (int m = 0; m < M; ++m)
          part[m][0][v] = multiply_add(splat(query[m][k]), load(Stored(), keys + k * PAGE + v * W), part[m][0][v]);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < PAGE_VECTORS; ++v) {
        F logit = ((part[m][0][v] + part[m][1][v]) + (part[m][2][v] + part[m][3][v])) * splat(a.scaling);
        if (a.softcap > 0)  // tanh(u) is 2 sigmoid(2u) - 1
          logit = splat(a.softcap) * (splat(2.0f) * sigmoid(logit * splat(2.0f / a.softcap)) - splat(1.0f));
        store(F32(), to[m] + v * W, logit);
      }
  }

  template <class Stored, int M>
  void add_values(State* of, const float* kept, const float (*weights)[PAGE], int from, int to,
                  const typename Stored::Element* values, int64_t stride, const char* ahead) const {
    constexpr int VECTORS = 4, SIZE = int(sizeof(typename Stored::Element));
    int64_t i = 0;
    for (; i + VECTORS * W <= a.value_width; i += VECTORS * W) {
      F sums_of[M][VECTORS];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums_of[m][v] = read<F>(of[m].sum + i + v * W) * splat(kept[m]);
      for (int j = from; j < to; ++j) {
#pragma GCC unroll 4
        for (int byte = 0; byte < VECTORS * W * SIZE; byte += 64)
          __builtin_prefetch(ahead + (j * stride + i) * SIZE + byte);
        F value[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) value[v] = load(Stored(), values + j * stride + i + v * W);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v)
            sums_of[m][v] = multiply_add(splat(weights[m][j]), value[v], sums_of[m][v]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(F32(), of[m].sum + i + v * W, sums_of[m][v]);
    }
    for (; i < a.value_width; i += W)
      for (int m = 0; m < M; ++m) {
        F one = read<F>(of[m].sum + i) * splat(kept[m]);
        for (int j = from; j < to; ++j)
          one = multiply_add(splat(weights[m][j]), load_up_to(Stored(), values + j * stride + i, a.value_width - i), one);
        store(F32(), of[m].sum + i, one);
      }
  }

  void finish(const State& state, int64_t token, int64_t head) const {
    Element* to = static_cast<Element*>(a.out) + (token * a.heads + head) * a.value_width;
    const F by = splat(1.0f) / splat(state.total);
    for (int64_t i = 0; i < a.value_width; i += W)
      store_up_to(Format(), to + i, read<F>(state.sum + i) * by, a.value_width - i);
  }

  int run() {
    Arena arena = {nullptr, 0};
    plan(arena);
    void* const scratch = borrow_scratch(arena.used);
    if (!scratch) return 1;
    arena = {static_cast<char*>(scratch), 0};
    plan(arena);
    memset(counters, 0, sizeof(Counter) * 2);
    first_item[0] = 0;
    for (int64_t s = 0; s < a.sequences; ++s)
      first_item[s + 1] =
          first_item[s] + (a.starts[s + 1] - a.starts[s] + rows_at_once - 1) / rows_at_once * a.kv_heads;
#pragma omp parallel num_threads(a.threads)
    work();
    return_scratch(scratch);
    return 0;
  }
};

}  // namespace moesaic::MOESAIC_VARIANT
