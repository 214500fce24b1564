#include "avx512.h"
#define LE_NAME "avx512"
#define LE_TABLE kernels_avx512
#include "bodies.h"
