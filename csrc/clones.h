// Plain loops, compiled once for each level of x86-64.
#pragma once

// ThreadSanitizer is not there yet when the loader chooses a clone.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_THREAD__)
#define RAG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RAG_CLONES
#endif
