// Scratch memory and the sharing of work between threads.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace moesaic {

// One block of memory, kept from call to call because fresh pages cost as much as using them; null without memory.
void* borrow_scratch(size_t bytes);
void return_scratch(void* scratch);

}  // namespace moesaic

namespace moesaic::MOESAIC_VARIANT {

// Hands out parts of one block. Run the same calls twice: with a null base to learn the size, then for real.
struct Arena {
  char* base;
  size_t used;

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += (size_t(count) * sizeof(T) + 127) / 128 * 128;
    return part;
  }
};

// Numbers 0, 1, ..., each given to one thread.
struct Counter {
  int64_t value;
  char alone[120];  // on cache lines of its own

  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

// The items below `count` that fall to this thread, each with the one that follows it (or `count`): known early, so
// that its memory can be fetched.
template <class Work>
inline void for_items(Counter& counter, int64_t count, const Work& work) {
  for (int64_t item = counter.next(), following; item < count; item = following) {
    following = counter.next();
    if (following > count) following = count;
    work(item, following);
  }
}

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A share for each thread several times over, so that a slow one holds nobody up, but no larger than `most`.
inline int64_t share(int64_t items, int threads, int64_t most) {
  const int64_t size = items / (int64_t(threads) * 8);
  return size < 1 ? 1 : size > most ? most : size;
}

}  // namespace moesaic::MOESAIC_VARIANT
