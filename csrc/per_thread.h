// What each thread has one of, made at its first use and destroyed with the thread.
#pragma once

namespace le {

// Notes that the thread's end destroys *object and clears it; throws std::bad_alloc.
void destroy_with_thread(void **object, void (*destroy)(void *));

// `object`: a thread_local pointer, NULL at first.
template <class T>
T &per_thread(void **object) {
  if (!*object) {
    T *made = new T;
    *object = made;
    try {
      destroy_with_thread(object, [](void *p) { delete static_cast<T *>(p); });
    } catch (...) {
      *object = nullptr;
      delete made;
      throw;
    }
  }
  return *static_cast<T *>(*object);
}

}  // namespace le

// `name`: the calling thread's own object. A thread_local of such a type would end the process
// where memory is short: glibc has no other answer when it cannot note a destructor.
#define LE_PER_THREAD(type, name)                    \
  static thread_local void *name##_object = nullptr; \
  type &name = ::le::per_thread<type>(&name##_object)
