// Everything of a kernel's process but the kernel, compiled once: the hooks that the compiler's sanitizers call,
// threads as fibers, and main.
#include "main.h"
