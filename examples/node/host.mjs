// A host in Node, through koffi. host.mjs LIBRARY ADAPTER
import { readFileSync } from "node:fs";
import koffi from "koffi";

const IN = 96, OUT = 80, ROWS = 4, STEPS = 25;
const ABI = 1, FLOAT32 = 0, APPLIED = 1;
const [library, adapter] = process.argv.slice(2);

const lib = koffi.load(library);
koffi.struct("le_array", {
  data: "void *", shape: koffi.array("int64", 4), strides: koffi.array("int64", 4),
  ndim: "int32", dtype: "int32", flags: "uint32",
});
koffi.struct("le_pool_options", {
  in_features: "int64", out_features: "int64 *", num_slices: "int32", dtype: "int32",
  capacity: "int64", max_rank: "int32", history: "int32", seed: "uint64",
});
koffi.struct("le_step", {
  lr: "float", lr_ratio: "float", max_norm: "float", weight_decay: "float", train_A: "int32",
  ewc: "void *",
});
const le = (name, result, args) => lib.func(`${result} ${name}(${args})`);
const abiVersion = le("le_abi_version", "int", "");
const lastError = le("le_last_error", "const char *", "void *ctx");
const contextCreate = le("le_context_create", "int", "void *options, _Out_ void **out");
const contextDestroy = le("le_context_destroy", "void", "void *ctx");
const poolCreate = le("le_pool_create", "int", "void *ctx, le_pool_options *options, _Out_ void **out");
const poolDestroy = le("le_pool_destroy", "void", "void *pool");
const poolImport = le("le_pool_import", "int",
  "void *pool, uint8_t *bytes, size_t size, void *modules, float scaling, _Out_ int32 *slot");
const poolExport = le("le_pool_export", "int",
  "void *pool, int32 slot, const char **modules, uint8_t *buffer, size_t capacity, _Out_ size_t *size");
const forwardSlot = le("le_pool_forward_slot", "int",
  "void *pool, int32 slot, le_array *x, int transposed, int accumulate, le_array *y");
const adaptSlot = le("le_pool_adapt_slot", "int",
  "void *pool, int32 slot, le_array *x, le_array *grad, le_step *step, _Out_ uint8_t *outcome, _Out_ double *norm");

function check(status) {
  if (status !== 0) throw new Error(lastError(null));
}

// Multiples of 1/16 from -1 to 1 (an LCG: Numerical Recipes).
let state = 1;
function draw(to) {
  for (let i = 0; i < to.length; ++i) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    to[i] = (((state >>> 8) % 33) - 16) / 16;
  }
}

// FNV-1a.
let digest = 2166136261;
function addToDigest(array) {
  for (const byte of new Uint8Array(array.buffer, array.byteOffset, array.byteLength))
    digest = Math.imul(digest ^ byte, 16777619);
}

const matrix = (data, rows, cols) => ({
  data: data, shape: [rows, cols, 0, 0], strides: [cols, 1, 0, 0], ndim: 2, dtype: FLOAT32, flags: 0,
});

if (abiVersion() !== ABI) throw new Error("another ABI");
const context = [null], pool = [null], slot = [0], outcome = [0], norm = [0], size = [0];
check(contextCreate(null, context));
check(poolCreate(context[0], {
  in_features: IN, out_features: BigInt64Array.of(BigInt(OUT)), num_slices: 1, dtype: FLOAT32,
  capacity: 0, max_rank: 0, history: 0, seed: 0,
}, pool));
const bytes = readFileSync(adapter);
check(poolImport(pool[0], bytes, bytes.length, null, 2.0, slot));

// Memory that does not move while the library holds its address.
const x = new Float32Array(ROWS * IN), y = new Float32Array(ROWS * OUT), target = new Float32Array(ROWS * OUT);
const ofX = matrix(x, ROWS, IN), ofY = matrix(y, ROWS, OUT);
const step = { lr: 0.001, lr_ratio: 1, max_norm: 1, weight_decay: 0, train_A: 1, ewc: null };
for (let i = 0; i < STEPS; ++i) {
  draw(x);
  draw(target);
  check(forwardSlot(pool[0], slot[0], ofX, 0, 0, ofY));
  addToDigest(y);
  for (let e = 0; e < y.length; ++e) y[e] -= target[e];
  check(adaptSlot(pool[0], slot[0], ofX, ofY, step, outcome, norm));
  if (outcome[0] !== APPLIED) throw new Error("nothing was learned");
}

const modules = ["served"];
check(poolExport(pool[0], slot[0], modules, null, 0, size));
const learned = new Uint8Array(Number(size[0]));
check(poolExport(pool[0], slot[0], modules, learned, learned.length, size));
addToDigest(learned);
console.log(`digest ${(digest >>> 0).toString(16).padStart(8, "0")}`);
poolDestroy(pool[0]);
contextDestroy(context[0]);
