/* What rustc expects of the runtime in a library built with -Zsanitizer=thread, and GCC's runtime lacks. Only in
 * programs built with EMAUDIT_SANITIZE=thread. */
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Three functions that rustc calls; they lead to the functions that the runtime watches. */

void *__tsan_memcpy(void *to, const void *from, size_t size);
void *__tsan_memmove(void *to, const void *from, size_t size);
void *__tsan_memset(void *to, int value, size_t size);

void *__tsan_memcpy(void *to, const void *from, size_t size) { return memcpy(to, from, size); }
void *__tsan_memmove(void *to, const void *from, size_t size) { return memmove(to, from, size); }
void *__tsan_memset(void *to, int value, size_t size) { return memset(to, value, size); }

/* The last share of a Rust `Arc` counts down with `release` and then fences with `acquire`. The runtime does not know
 * fences, so it would take every release of memory for a race. The order is stated on the counting down instead, as
 * the standard library does where it is itself built for the sanitizer. */

uint64_t __tsan_atomic64_fetch_add(volatile void *at, uint64_t value, int order);
uint64_t __tsan_atomic64_fetch_sub(volatile void *at, uint64_t value, int order);

uint64_t __tsan_atomic64_fetch_sub(volatile void *at, uint64_t value, int order) {
  enum { release = 3, acquire_release = 4 };
  return __tsan_atomic64_fetch_add(at, 0 - value, order == release ? acquire_release : order);
}

#ifdef __cplusplus
}
#endif
