/* Three functions that rustc calls in a library built with -Zsanitizer=thread and that GCC's runtime lacks. They
 * lead to the functions that the runtime watches. Only in programs built with EMAUDIT_SANITIZE=thread. */
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

void *__tsan_memcpy(void *to, const void *from, size_t size);
void *__tsan_memmove(void *to, const void *from, size_t size);
void *__tsan_memset(void *to, int value, size_t size);

void *__tsan_memcpy(void *to, const void *from, size_t size) { return memcpy(to, from, size); }
void *__tsan_memmove(void *to, const void *from, size_t size) { return memmove(to, from, size); }
void *__tsan_memset(void *to, int value, size_t size) { return memset(to, value, size); }

#ifdef __cplusplus
}
#endif
