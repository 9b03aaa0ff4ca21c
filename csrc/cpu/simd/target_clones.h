// Compiles a named function once per x86-64 level and lets the loader pick; plain loops in it vectorise to that level's
// registers and fused multiply-adds. It does not reach lambdas. The arch levels, unlike "avx2", include FMA.
#pragma once

#if defined(__x86_64__) && !defined(__clang__)
#define QRM_FAST_TARGET_CLONES [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define QRM_FAST_TARGET_CLONES
#endif
