// How a mistake is told to Python: one line on stderr, "LINE file:line: text" or "PC address: text", and exit status 3.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

enum { FAILED = 3 };

[[noreturn]] inline void finish(const char* format, va_list args) {
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  fflush(stderr);
  _exit(FAILED);
}

[[noreturn]] __attribute__((format(printf, 3, 4))) inline void fail(
    const char* file, int line, const char* format, ...) {
  fprintf(stderr, "LINE %s:%d: ", file, line);
  va_list args;
  va_start(args, format);
  finish(format, args);
}

extern "C" char __executable_start;  // from the linker: where this program was loaded

// `pc` is a return address: the call before it made the access.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail_at(const void* pc, const char* format, ...) {
  fprintf(stderr, "PC 0x%zx: ", size_t(pc) - 1 - size_t(&__executable_start));
  va_list args;
  va_start(args, format);
  finish(format, args);
}
