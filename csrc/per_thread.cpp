#include "per_thread.h"

#include <pthread.h>

#include <new>

namespace le {
namespace {

struct Note {
  void **object;
  void (*destroy)(void *);
  Note *next;  // made before it
};

void destroy_all(void *first) {
  for (Note *note = static_cast<Note *>(first); note;) {
    void *object = *note->object;
    *note->object = nullptr;
    note->destroy(object);
    Note *next = note->next;
    delete note;
    note = next;
  }
}

pthread_key_t make_key() {
  pthread_key_t key;
  if (pthread_key_create(&key, destroy_all)) throw std::bad_alloc();
  return key;
}

}  // namespace

void destroy_with_thread(void **object, void (*destroy)(void *)) {
  static const pthread_key_t key = make_key();
  auto *note = new Note{object, destroy, static_cast<Note *>(pthread_getspecific(key))};
  if (pthread_setspecific(key, note)) {
    delete note;
    throw std::bad_alloc();
  }
}

}  // namespace le
