#include "../module.h"

QRM_FAST_EMPTY_MODULE(_cuda)
