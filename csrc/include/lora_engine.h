/* lora_engine: per-row LoRA adapters that are applied and learned online.
 *
 * This header is the only door into the C++ core; the Python module goes
 * through it too. Conventions, once:
 *
 * - Shapes: x [n, in], A [r, in], B [out, r], y and grad [n, out]. A vector
 *   (ndim 1) stands for one row. The delta of a row is scaling * B (A x).
 * - Arrays are borrowed for the length of the call and described by le_array:
 *   strides count elements, not bytes. Outputs are owned by the caller.
 * - Handles are opaque. A pool keeps its context, an le_ewc and an le_view their pool, so they
 *   may be destroyed in any order. A handle that was destroyed is refused (LE_ERROR_VALUE), and
 *   destroying it again does nothing, until its memory is issued again, after 64 others.
 * - Every function that can fail returns an le_status; le_last_error(ctx)
 *   says what was wrong, in words, for the calling thread. Arguments are
 *   checked before any memory is touched: on such an error nothing was written.
 *   After LE_ERROR_MEMORY the outputs may be written in part; an adapter is
 *   whole, as it was or as it should become.
 * - All functions may be called from any thread, except the *_destroy
 *   functions, which need their handle to be idle. Forward on a slot while another thread
 *   adapts it sees its weights before or after. Nothing is thrown, nothing is printed.
 */
#ifndef LORA_ENGINE_H
#define LORA_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define LE_API __declspec(dllexport)
#else
#define LE_API __attribute__((visibility("default")))
#endif

#define LE_VERSION_MAJOR 0
#define LE_VERSION_MINOR 1
#define LE_VERSION_PATCH 0
#define LE_ABI_VERSION 1

typedef enum le_status {
  LE_OK = 0,
  LE_ERROR_VALUE = 1,       /* a shape, range or overlap is wrong */
  LE_ERROR_TYPE = 2,        /* a dtype is wrong */
  LE_ERROR_INDEX = 3,       /* a slot does not exist or was removed */
  LE_ERROR_MEMORY = 4,      /* an allocation failed */
  LE_ERROR_UNSUPPORTED = 5, /* known, but not in this build or on this CPU */
  LE_ERROR_INTERNAL = 6     /* a defect of the engine */
} le_status;

typedef enum le_dtype {
  LE_FLOAT32 = 0,
  LE_BFLOAT16 = 1,
  LE_FLOAT16 = 2, /* IEEE 754 binary16 */
  LE_INT32 = 3,
  LE_UINT8 = 4,  /* packed NF4 */
  LE_FLOAT64 = 5 /* only of sums: the outputs of le_lora_fisher and its factors */
} le_dtype;

#define LE_MAX_DIMS 4
#define LE_MAX_RANK 65536 /* of an adapter, in the pool or in arrays */
#define LE_ARRAY_READONLY 1u

typedef struct le_array {
  void *data; /* aligned to its dtype; NULL with ndim 0 is "none" where that is possible */
  int64_t shape[LE_MAX_DIMS];
  int64_t strides[LE_MAX_DIMS]; /* in elements; may be 0 or negative */
  int32_t ndim;
  int32_t dtype; /* an le_dtype */
  uint32_t flags;
} le_array;

typedef struct le_context le_context;
typedef struct le_pool le_pool;
typedef struct le_ewc le_ewc;

/* ---- version, status, instruction set ---------------------------------- */

/* (major << 16) | (minor << 8) | patch of the library that was loaded. */
LE_API uint32_t le_version(void);
/* Compare with LE_ABI_VERSION before anything else. */
LE_API int32_t le_abi_version(void);
LE_API const char *le_status_string(int32_t status); /* an le_status, or any number */
/* What the calling thread's last failing call said of those with this context, its pools
 * and their le_ewc, or with no usable handle at all; ctx NULL: of all. "" if none failed. For
 * the four contexts that failed last; valid until the thread's next failing call. */
LE_API const char *le_last_error(const le_context *ctx);

/* Name of the instruction set in use: chosen at first use, the best this CPU
 * has, or what the environment variable LORA_ENGINE_ISA names. NULL if that
 * variable names one that cannot be had (every op then fails and says so). */
LE_API const char *le_isa(void);
/* The i-th instruction set this library was built with (NULL past the end),
 * and whether this CPU runs it. */
LE_API const char *le_isa_built(int32_t i, int32_t *supported);

/* A tensor of DLPack as an le_array, for any function here: const DLTensor * of dlpack.h, which
 * this header does not include. In memory that the CPU reads; of a dtype of le_dtype; at most
 * LE_MAX_DIMS dimensions. Its memory, not its shape, is borrowed by what is written to *out. */
LE_API le_status le_array_from_dltensor(const void *dltensor, le_array *out);

/* ---- context: threads, memory, log --------------------------------------- */

/* Threads that the host lends. run must call task(arg, i) once for every i in [0, count), on
 * any of its threads and the calling one, at the same time or in turn, and return when all of
 * them have. It may be called by several threads at once; num_threads: as many as can take part
 * in one run, from 1. Neither a task nor run may throw. */
typedef struct le_host_threads {
  void *user;
  int32_t num_threads;
  void (*run)(void *user, int64_t count, void (*task)(void *arg, int64_t i), void *arg);
} le_host_threads;

/* Where adapters, slot tables and EWC records lie: what grows with the number of adapters. Work
 * buffers, which belong to threads, do not. allocate returns memory aligned as malloc's, or NULL
 * (the call then ends in LE_ERROR_MEMORY); release gets the same number of bytes, in any thread. */
typedef struct le_allocator {
  void *user;
  void *(*allocate)(void *user, size_t bytes);
  void (*release)(void *user, void *memory, size_t bytes);
} le_allocator;

typedef enum le_log_level {
  LE_LOG_ERROR = 0,  /* a call failed; the text of le_last_error */
  LE_LOG_WARNING = 1 /* it works, with fewer threads than were asked for */
} le_log_level;

/* Called on the thread that it happened on, which may hold locks of the engine: write must not
 * call the engine. The text is valid during the call. */
typedef struct le_log {
  void *user;
  void (*write)(void *user, int32_t level, const char *text);
} le_log;

typedef struct le_context_options {
  int32_t abi_version;            /* LE_ABI_VERSION; another is LE_ERROR_UNSUPPORTED */
  int32_t num_threads;            /* 0: the CPUs the process may run on, or all that are lent */
  const le_host_threads *threads; /* NULL: workers of its own. All three are copied, */
  const le_allocator *allocator;  /* NULL: malloc;      and what they name must last until */
  const le_log *log;              /* NULL: none         the context and its pools are destroyed */
} le_context_options;

/* What NULL stands for. */
#define LE_CONTEXT_OPTIONS {LE_ABI_VERSION, 0, NULL, NULL, NULL}

/* Its own workers start when first needed and park within 50 us of their last work. One context
 * is enough for a process. */
LE_API le_status le_context_create(const le_context_options *options, le_context **out);
LE_API void le_context_destroy(le_context *ctx); /* NULL: nothing */
/* 1 to 4096; of lent threads, at most as many as there are take part. */
LE_API le_status le_set_num_threads(le_context *ctx, int32_t num_threads);
/* 0 where ctx is no context in use. */
LE_API int32_t le_get_num_threads(const le_context *ctx);
/* Caps the threads that calls from this thread use (0: no cap); returns the
 * cap that was in force. */
LE_API int32_t le_limit_threads(int32_t num_threads);
/* How work is dealt out, measured for a CPU by `lora-engine tune`: how many bytes
 * of work a further thread is worth (0: 192 KiB), and how many rows of a batch
 * share one pass over an adapter's weights (0: 16). No result depends on either. */
LE_API le_status le_set_tuning(le_context *ctx, int64_t bytes_per_thread, int64_t tile_rows);

/* What the engine did. Counting costs under 1 % of the shortest call; a build with
 * -DLORA_ENGINE_COUNTERS=OFF does without, and then tells zeros. */
#define LE_TIMED_EVERY 64      /* calls: one of them is timed, drawn at random */
#define LE_DURATION_BUCKETS 20 /* up to 1, 2, 4 ... 2^19 us; one more holds what took longer */

typedef struct le_op_counters {
  uint64_t calls;                            /* refused ones included */
  uint64_t timed;                            /* of them */
  double seconds;                            /* that the timed ones took */
  uint64_t buckets[LE_DURATION_BUCKETS + 1]; /* the timed ones, by what they took */
} le_op_counters;

typedef struct le_counters {
  le_op_counters forward; /* le_pool_forward, le_pool_forward_slot */
  le_op_counters adapt;   /* le_pool_adapt, le_pool_adapt_slot, ..._observed */
  uint64_t skipped;       /* rows of these whose step was not finite, so that nothing was learned */
  int64_t resident;       /* adapters in the pools of the context, now */
} le_counters;

/* Since the library was loaded, over all contexts but for `resident`. Threads go on meanwhile:
 * a call that has not ended may be in one number and not yet in another. */
LE_API le_status le_get_counters(le_context *ctx, le_counters *out);

/* ---- ops on arrays ------------------------------------------------------ */

/* y = scaling (x A^T) B^T, or y += with accumulate. A and B share a dtype,
 * x and y share a dtype; accumulation is in float32. */
LE_API le_status le_lora_delta(le_context *ctx, const le_array *x, const le_array *A,
                               const le_array *B, float scaling, int32_t accumulate,
                               const le_array *y);

/* The proximal EWC step on arrays of one shape ([n] or [n, m]):
 *   theta <- (theta - lr g + lr c F anchor) / (1 + lr c F),  c = 2 ewc_lambda.
 * F and anchor are float32. A theta of 16 bits is rounded stochastically, keyed
 * (seed, 0, version, element). */
LE_API le_status le_ewc_step(le_context *ctx, const le_array *theta, const le_array *grad,
                             const le_array *fisher, const le_array *anchor, float lr,
                             float ewc_lambda, uint64_t seed, uint64_t version);

/* F <- gamma F + scale g * g (element by element), in F's dtype: the running
 * Fisher information of arrays of one shape, [n] or [n, m]. */
LE_API le_status le_fisher_accumulate(le_context *ctx, const le_array *F, const le_array *g,
                                      float gamma, float scale);

/* Sums over samples of squared per-sample gradients of A and B, the Fisher
 * information's diagonal: F_A [r, in], F_B [out, r], float32 or float64, or +=
 * with accumulate. segments int32 [S+1]: sample i is rows [segments[i],
 * segments[i+1]), summed before they are squared; none: a sample is a row. x
 * and grad share a dtype, A and B share a dtype. Up to 64 samples are summed in
 * float32, their totals in float64; a sum that is continued over calls keeps
 * its precision in float64 outputs. */
LE_API le_status le_lora_fisher(le_context *ctx, const le_array *x, const le_array *grad,
                                const le_array *A, const le_array *B, float scaling,
                                const le_array *segments, int32_t accumulate, const le_array *F_A,
                                const le_array *F_B);
/* u [out] = sum of grad^2 and v [in] = sum of x^2 over rows, likewise. */
LE_API le_status le_lora_fisher_factors(le_context *ctx, const le_array *x, const le_array *grad,
                                        int32_t accumulate, const le_array *u, const le_array *v);

/* ---- adapter pool ------------------------------------------------------- */

typedef struct le_pool_options {
  int64_t in_features;
  const int64_t *out_features; /* one per slice; copied */
  int32_t num_slices;
  int32_t dtype;    /* LE_FLOAT32, LE_BFLOAT16 or LE_FLOAT16: how weights are stored */
  int64_t capacity; /* most live slots at a time; 0: no limit */
  int32_t max_rank; /* of a slice; 0: no limit but LE_MAX_RANK */
  int32_t history;  /* 1 keeps the weights before the last change */
  uint64_t seed;    /* of the stochastic rounding of 16-bit storage */
} le_pool_options;

LE_API le_status le_pool_create(le_context *ctx, const le_pool_options *options, le_pool **out);
LE_API void le_pool_destroy(le_pool *pool);

/* A and B are arrays of num_slices le_array; a missing slice has data NULL.
 * Float32, bfloat16 and float16 are taken and rounded to the pool's dtype. */
LE_API le_status le_pool_add(le_pool *pool, const le_array *A, const le_array *B, float scaling,
                             int32_t *slot);
LE_API le_status le_pool_set(le_pool *pool, int32_t slot, const le_array *A, const le_array *B,
                             float scaling);
/* Writes the slot's weights to caller-owned arrays of the shapes that le_pool_ranks
 * implies, none of which overlap; "none" skips one. */
LE_API le_status le_pool_get(le_pool *pool, int32_t slot, const le_array *A, const le_array *B,
                             float *scaling);
/* Zeroes the slot's memory and frees it; freed slots are reissued oldest first. */
LE_API le_status le_pool_remove(le_pool *pool, int32_t slot);
/* The same for several, int32 [K], each once: nothing is removed where one was not in use. */
LE_API le_status le_pool_remove_all(le_pool *pool, const le_array *slots);
/* ranks: num_slices values, 0 for a missing slice. */
LE_API le_status le_pool_ranks(le_pool *pool, int32_t slot, int32_t *ranks);
/* Grows by one with every change to the slot: add, set, adapt, rollback. */
LE_API le_status le_pool_version(le_pool *pool, int32_t slot, uint64_t *version);
/* Brings back the weights before the last change (history = 1), once. */
LE_API le_status le_pool_rollback(le_pool *pool, int32_t slot);

/* The weights of a slot where they lie, for a caller that reads or steps them in place, which no
 * lock of the slot knows of: a call that reads them meanwhile may see some stepped and some not.
 * slices: num_slices views each of A [r, in] and of the transpose of B [r, out], in the pool's
 * dtype; those of a missing slice have ndim 0. They never move. After set, rollback, remove or an
 * adapt with history they are no longer the slot's; set and remove zero them. They are memory that
 * may be read and written until le_view_release (NULL: nothing). A view keeps its pool. */
typedef struct le_view le_view;
LE_API le_status le_pool_view(le_pool *pool, int32_t slot, le_array *A, le_array *B_transposed,
                              le_view **out);
LE_API void le_view_release(le_view *view);
/* The slot's weights as a safetensors file in memory, in the pool's dtype and under PEFT's keys:
 * base_model.model.<module>.lora_A.weight [r, in] and ...lora_B.weight [out, r]. modules: one
 * name a slice, UTF-8, none twice; that of a missing slice is not read. *size is set to the
 * bytes there are; with buffer NULL nothing else is done, else capacity must hold them. The
 * scaling is not in it: PEFT keeps lora_alpha in adapter_config.json. */
LE_API le_status le_pool_export(le_pool *pool, int32_t slot, const char *const *modules,
                                void *buffer, size_t capacity, size_t *size);
/* Adds an adapter from such bytes, of any origin: all is checked before anything is allocated
 * for it. Tensors of other modules are ignored, a slice whose module is not there is missing. F32,
 * BF16 and F16 are taken; NaN and Inf are refused. modules NULL: a pool of one slice, bytes of
 * one module. scaling: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. */
LE_API le_status le_pool_import(le_pool *pool, const void *bytes, size_t size,
                                const char *const *modules, float scaling, int32_t *slot);

typedef struct le_pool_info {
  int64_t live;   /* slots in use */
  int64_t issued; /* slot ids ever issued: every id is below it */
  int64_t bytes;  /* allocated by the pool, bookkeeping included */
} le_pool_info;
LE_API le_status le_pool_get_info(le_pool *pool, le_pool_info *info);

/* y_i += sum_j w_ij scaling_j B_j (A_j x_i); without accumulate y_i = that.
 * ids int32 [n] or [n, k], -1 for none; weights float32 like ids, or NULL for
 * ones. A row with no adapter keeps its bits (without accumulate: zeros). A
 * row's result does not depend on the other rows. transposed: x is [n, out], y
 * [n, in], and a row's result is sum_j w_ij scaling_j A_j^T (B_j^T x_i): the
 * gradient with respect to x. */
LE_API le_status le_pool_forward(le_pool *pool, const le_array *x, const le_array *ids,
                                 const le_array *weights, int32_t transposed, int32_t accumulate,
                                 const le_array *y);

/* The same with one slot for all rows; transposed only of a pool of one slice. */
LE_API le_status le_pool_forward_slot(le_pool *pool, int32_t slot, const le_array *x,
                                      int32_t transposed, int32_t accumulate, const le_array *y);

/* ---- NF4: 4-bit weights as bitsandbytes stores them ---------------------- */

/* A matrix W [rows, cols], rows being the out features; borrowed, never written.
 * Two codes a byte over the flat row-major tensor, the even element in the high
 * bits; blocks of `blocksize` elements run over the flat tensor and share a scale:
 * absmax[i], or with double quantisation (absmax NULL)
 * nested_map[absmax_codes[i]] * nested_absmax[i / nested_blocksize] + nested_offset. */
typedef struct le_nf4 {
  const uint8_t *packed; /* [(rows * cols + 1) / 2] */
  int64_t rows, cols;
  int32_t blocksize;           /* a power of two, 32 to 4096 */
  const float *absmax;         /* [blocks], blocks = ceil(rows * cols / blocksize) */
  const uint8_t *absmax_codes; /* [blocks] */
  const float *nested_absmax;  /* [ceil(blocks / nested_blocksize)] */
  const float *nested_map;     /* [256] */
  int32_t nested_blocksize;
  float nested_offset;
} le_nf4;

/* Encodes W [rows, cols] into caller-owned packed [(rows * cols + 1) / 2] and
 * absmax [blocks]: the upper of two codes where W / absmax is above their midpoint.
 * A value that is not finite is LE_ERROR_VALUE. */
LE_API le_status le_nf4_encode(le_context *ctx, const le_array *W, int32_t blocksize,
                               uint8_t *packed, float *absmax);
/* W = code * absmax in float32, then rounded to the dtype of W [rows, cols]. */
LE_API le_status le_nf4_decode(le_context *ctx, const le_nf4 *w, const le_array *W);

/* y = x W^T + bias + the pool's deltas: x [n, cols], y [n, rows] of x's dtype, bias
 * [rows] or NULL; pool NULL, or one of in features cols and out features rows with ids
 * and weights as in le_pool_forward. compute: LE_FLOAT32, LE_BFLOAT16 (x is rounded to
 * it, codes where that is faster, sums stay float32), or -1: that of x, float32 for float16. A row
 * of no adapter has the bits it has without a pool. */
LE_API le_status le_nf4_linear(le_context *ctx, const le_array *x, const le_nf4 *w,
                               const le_array *bias, le_pool *pool, const le_array *ids,
                               const le_array *weights, int32_t compute, const le_array *y);
/* dx = grad W: grad [n, rows], dx [n, cols] of grad's dtype. W is never decoded whole. */
LE_API le_status le_nf4_linear_backward(le_context *ctx, const le_array *grad, const le_nf4 *w,
                                        const le_array *dx);

/* ---- learning ----------------------------------------------------------- */

typedef struct le_step {
  float lr;           /* from 0 */
  float lr_ratio;     /* LoRA+: B learns at lr_ratio * lr; 1 */
  float max_norm;     /* clips gA and gB together; 0: no clipping */
  float weight_decay; /* decoupled: theta -= lr weight_decay theta; 0 */
  int32_t train_A;    /* 0: LoRA-FA, only B learns */
  le_ewc *ewc;        /* NULL: none */
} le_step;

/* What became of a row or a slot. */
typedef enum le_outcome {
  LE_NO_ADAPTER = 0, /* the row named none: nothing was learned */
  LE_APPLIED = 1,
  LE_NOT_FINITE = 2,  /* the gradient or the step held NaN or Inf: the adapter is untouched */
  LE_NOT_OBSERVED = 3 /* applied, but too large for sums of squares (..._observed alone) */
} le_outcome;

/* One gradient step for every adapter named, from the values before the call:
 * gB = mean over its rows of w scaling grad h^T, gA = mean of
 * w scaling (B^T grad) x^T, h = A x. outcomes: n bytes of le_outcome, the
 * worst of a row's adapters. Rows of one adapter are summed in row order. */
LE_API le_status le_pool_adapt(le_pool *pool, const le_array *x, const le_array *grad,
                               const le_array *ids, const le_array *weights, const le_step *step,
                               uint8_t *outcomes);

/* The same for one slot. grad_norm: of gA and gB together, before clipping. */
LE_API le_status le_pool_adapt_slot(le_pool *pool, int32_t slot, const le_array *x,
                                    const le_array *grad, const le_step *step, uint8_t *outcome,
                                    double *grad_norm);
/* The same, and where the step was applied the samples' Fisher factors are added up with it:
 * row `slot` of u [., out] += the sum over rows of grad^2, of v [., in] += that of x^2, float32.
 * Where either is above 1e30 in all, so that sums might become Inf, both stay as they are and the
 * outcome is LE_NOT_OBSERVED. */
LE_API le_status le_pool_adapt_slot_observed(le_pool *pool, int32_t slot, const le_array *x,
                                             const le_array *grad, const le_step *step,
                                             const le_array *u, const le_array *v, uint8_t *outcome,
                                             double *grad_norm);

/* Floats in a slot's gradient buffer: for each slice its gA [r, in], then the
 * transpose of its gB [r, out]. */
LE_API le_status le_pool_gradient_size(le_pool *pool, int32_t slot, int64_t *size);
/* gradient += the sum over rows (no mean) of the gradients of a slot. h is
 * NULL (recomputed) or A x, float32 [n, sum of ranks]. Where the sum would
 * hold NaN or Inf, nothing is added and the outcome is LE_NOT_FINITE. */
LE_API le_status le_pool_gradient(le_pool *pool, int32_t slot, const le_array *x,
                                  const le_array *grad, const le_array *h, const le_array *gradient,
                                  uint8_t *outcome, double *grad_norm);
/* One step with the gradient `scale * gradient`. */
LE_API le_status le_pool_apply(le_pool *pool, int32_t slot, const le_array *gradient, float scale,
                               const le_step *step, uint8_t *outcome, double *grad_norm);
/* h = A x of a slot, float32 [n, sum of ranks]. */
LE_API le_status le_pool_shrink(le_pool *pool, int32_t slot, const le_array *x, const le_array *h);

/* ---- elastic weight consolidation, one record a slot -------------------- */

typedef enum le_ewc_form { LE_EWC_FACTOR = 0, LE_EWC_DELTA = 1 } le_ewc_form;

LE_API le_status le_ewc_create(le_pool *pool, int32_t form, float ewc_lambda, le_ewc **out);
LE_API void le_ewc_destroy(le_ewc *ewc);
/* Records the Fisher information of a slot, and its weights now as the anchor. first and
 * second: num_slices le_array each, float32, not negative; those of a missing slice are
 * not read. LE_EWC_FACTOR: F_A [r, in] and F_B [out, r]. LE_EWC_DELTA: u [out] and v [in],
 * the Fisher information of the delta being u v^T. */
LE_API le_status le_ewc_set(le_ewc *ewc, int32_t slot, const le_array *first,
                            const le_array *second);
/* The same with anchors of the caller's, float32 [r, in] and [out, r]. */
LE_API le_status le_ewc_restore(le_ewc *ewc, int32_t slot, const le_array *first,
                                const le_array *second, const le_array *anchor_A,
                                const le_array *anchor_B);
/* Writes a slot's record to caller-owned float32 arrays of those shapes, none of which overlap;
 * "none" skips one. LE_ERROR_VALUE where the slot has none. */
LE_API le_status le_ewc_get(le_ewc *ewc, int32_t slot, const le_array *first,
                            const le_array *second, const le_array *anchor_A,
                            const le_array *anchor_B);
LE_API le_status le_ewc_remove(le_ewc *ewc, int32_t slot);
/* Over the slots with a record, in factor form lambda sum F (theta - anchor)^2; in delta form
 * lambda scaling^2 sum_ij u_i v_j (B A - B* A*)_ij^2. */
LE_API le_status le_ewc_penalty(le_ewc *ewc, double *penalty);

/* ---- consolidation: many adapters into one ------------------------------- */

/* What is merged, and how. A served delta is D_0 + D_k, the base's and one
 * session's, D = scaling B A; so what session k asks of the new base is D_0 + D_k. */
typedef struct le_merge {
  const le_array *slots;   /* int32 [K], K from 1, each once: the sessions' */
  const le_array *weights; /* float32 [K + 1], 0 or more: of the base, then of the slots */
  /* Without u and v: the SVD of D_0 + sum_k weights_k D_k (weights_0 is not read) by
   * subspace iteration, cut to the rank. With u [., out] and v [., in], float32, a row a
   * slot id: the minimum over D of rank r of the sum over the base (its target D_0) and
   * the slots (D_0 + D_k) of weights_k sum_ij u_k[i] v_k[j] (D - target_k)_ij^2, by
   * alternating exact solves from that SVD; where nothing weighs, D_0 is kept. samples:
   * float32 [K + 1] above 0: rows of u and v are sums over so many; NULL: they are means. */
  const le_array *u, *v, *samples;
  int32_t rank;        /* of the result, 1 to 256 */
  float scaling;       /* that the result will have: above 0 */
  int32_t max_sweeps;  /* of the iteration, and of the solves */
  float tolerance;     /* ends either at a sweep that gains no more than this part */
  int32_t num_threads; /* at most; 1 leaves the context's workers to others */
} le_merge;

typedef struct le_merge_info {
  int32_t subspace_sweeps, sweeps; /* that were made */
} le_merge_info;

/* A [r, in] and B [out, r] = U sqrt(S) and sqrt(S) V^T over sqrt(scaling); a direction
 * without content has B 0 and a unit row in A. For a pool of one slice. Each slot is read
 * under its lock, one after another, and versions [K + 1] says which state was: whoever
 * zeroes a slot after that knows whether it learned meanwhile. Nothing in the pool changes. */
LE_API le_status le_consolidate(le_pool *pool, int32_t base, const le_merge *merge,
                                const le_array *A, const le_array *B, uint64_t *versions,
                                le_merge_info *info);

#ifdef __cplusplus
}
#endif

#endif /* LORA_ENGINE_H */
