// The C ABI: picks the variant for this CPU, and keeps the scratch memory.
#include <stdlib.h>
#include <string.h>

#include "team.hpp"
#include "variant.hpp"

#if defined(__x86_64__)
#define MOESAIC_X86 1
#endif

namespace moesaic {

namespace portable {
extern const Variant functions;
}
#if MOESAIC_X86
namespace avx2 {
extern const Variant functions;
}
namespace avx512 {
extern const Variant functions;
}
namespace avx512_bf16 {
extern const Variant functions;
}
#endif

namespace {

bool always() { return true; }

#if MOESAIC_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Choice {
  const char* name;
  bool (*runs)();
  const Variant* functions;
};

// The best first.
const Choice CHOICES[] = {
#if MOESAIC_X86
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16::functions},
    {"avx512", has_avx512, &avx512::functions},
    {"avx2", has_avx2, &avx2::functions},
#endif
    {"portable", always, &portable::functions},
};

const Choice* best() {
  const Choice* choice = CHOICES;
  while (!choice->runs()) ++choice;
  return choice;
}

const Choice* chosen = best();

// ---- scratch ----

constexpr int KEPT = 4;                            // blocks, for calls of several threads at once
constexpr size_t LARGEST_KEPT = size_t(64) << 20;  // bytes a block

struct Header {
  size_t bytes;
  char rest[120];  // what follows begins on a cache line of its own
};

Header* kept[KEPT];

Header* exchange(int place, Header* block) { return __atomic_exchange_n(&kept[place], block, __ATOMIC_ACQ_REL); }

}  // namespace

void* borrow_scratch(size_t bytes) {
  for (int place = 0; place < KEPT; ++place) {
    Header* const block = exchange(place, nullptr);
    if (!block) continue;
    if (block->bytes >= bytes) return block + 1;
    return_scratch(block + 1);
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, sizeof(Header) + bytes)) return nullptr;
  Header* const block = static_cast<Header*>(memory);
  block->bytes = bytes;
  return block + 1;
}

void return_scratch(void* scratch) {
  Header* block = static_cast<Header*>(scratch) - 1;
  for (int place = 0; place < KEPT && block && block->bytes <= LARGEST_KEPT; ++place) block = exchange(place, block);
  free(block);
}

}  // namespace moesaic

using namespace moesaic;

int moesaic_forward(const MoesaicLayer* layer) { return chosen->functions->forward(*layer); }

int moesaic_route_and_forward(const MoesaicGate* gate, const MoesaicLayer* layer) {
  return chosen->functions->route_and_forward(*gate, *layer);
}

int moesaic_backward(const MoesaicLayer* layer, const MoesaicGradients* gradients) {
  return chosen->functions->backward(*layer, *gradients);
}

int moesaic_linear(const MoesaicLinear* layer) { return chosen->functions->linear(*layer); }

int moesaic_attend(const MoesaicAttention* attention) { return chosen->functions->attend(*attention); }

int moesaic_abi(void) { return MOESAIC_ABI; }

const char* moesaic_isas(void) {
  static char names[64];
  char line[64] = "";
  for (const Choice& choice : CHOICES) {
    if (!choice.runs()) continue;
    if (line[0]) strcat(line, ",");
    strcat(line, choice.name);
  }
  return strcpy(names, line);
}

const char* moesaic_isa(void) { return chosen->name; }

int moesaic_choose_isa(const char* name) {
  for (const Choice& choice : CHOICES) {
    if (strcmp(choice.name, name) || !choice.runs()) continue;
    chosen = &choice;
    return 0;
  }
  return 1;
}

int moesaic_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

uint64_t moesaic_read(const void* data, int64_t bytes, int32_t threads) {
  return chosen->functions->read(data, bytes, threads);
}

double moesaic_multiply_adds(int32_t dtype, int64_t steps, int32_t threads) {
  return chosen->functions->multiply_adds(dtype, steps, threads);
}
