//! Bindings by hand of what this host calls of lora_engine.h, and owners for its handles.
use std::ffi::{c_char, c_float, c_void, CStr, CString};
use std::marker::PhantomData;
use std::ptr::{null, null_mut};

const ABI: i32 = 1;
const FLOAT32: i32 = 0;
pub const APPLIED: u8 = 1;

#[repr(C)]
pub struct Array<'a> {
    data: *mut c_void,
    shape: [i64; 4],
    strides: [i64; 4],
    ndim: i32,
    dtype: i32,
    flags: u32,
    borrowed: PhantomData<&'a mut [f32]>,
}

#[repr(C)]
struct PoolOptions {
    in_features: i64,
    out_features: *const i64,
    num_slices: i32,
    dtype: i32,
    capacity: i64,
    max_rank: i32,
    history: i32,
    seed: u64,
}

#[repr(C)]
pub struct Step {
    pub lr: c_float,
    pub lr_ratio: c_float,
    pub max_norm: c_float,
    pub weight_decay: c_float,
    pub train_a: i32,
    pub ewc: *mut c_void,
}

#[link(name = "lora_engine")]
extern "C" {
    fn le_abi_version() -> i32;
    fn le_last_error(ctx: *const c_void) -> *const c_char;
    fn le_context_create(options: *const c_void, out: *mut *mut c_void) -> i32;
    fn le_context_destroy(ctx: *mut c_void);
    fn le_pool_create(ctx: *mut c_void, options: *const PoolOptions, out: *mut *mut c_void) -> i32;
    fn le_pool_destroy(pool: *mut c_void);
    fn le_pool_import(
        pool: *mut c_void, bytes: *const c_void, size: usize, modules: *const *const c_char,
        scaling: c_float, slot: *mut i32,
    ) -> i32;
    fn le_pool_export(
        pool: *mut c_void, slot: i32, modules: *const *const c_char, buffer: *mut c_void,
        capacity: usize, size: *mut usize,
    ) -> i32;
    fn le_pool_forward_slot(
        pool: *mut c_void, slot: i32, x: *const Array, transposed: i32, accumulate: i32,
        y: *const Array,
    ) -> i32;
    fn le_pool_adapt_slot(
        pool: *mut c_void, slot: i32, x: *const Array, grad: *const Array, step: *const Step,
        outcome: *mut u8, grad_norm: *mut f64,
    ) -> i32;
}

/// Rows of `cols` elements, borrowed.
pub fn matrix(data: &mut [f32], cols: usize) -> Array<'_> {
    Array {
        shape: [(data.len() / cols) as i64, cols as i64, 0, 0],
        strides: [cols as i64, 1, 0, 0],
        data: data.as_mut_ptr().cast(),
        ndim: 2,
        dtype: FLOAT32,
        flags: 0,
        borrowed: PhantomData,
    }
}

fn check(status: i32) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: a text that lives until this thread's next failing call.
    let said = unsafe { CStr::from_ptr(le_last_error(null())) };
    Err(said.to_string_lossy().into_owned())
}

/// One slice, float32. Destroyed with its context.
pub struct Pool {
    context: *mut c_void,
    pool: *mut c_void,
}

impl Pool {
    pub fn new(in_features: usize, out_features: usize) -> Result<Pool, String> {
        let mut made = Pool { context: null_mut(), pool: null_mut() };
        let outs = [out_features as i64];
        let options = PoolOptions {
            in_features: in_features as i64, out_features: outs.as_ptr(), num_slices: 1,
            dtype: FLOAT32, capacity: 0, max_rank: 0, history: 0, seed: 0,
        };
        // SAFETY: pointers to locals, which outlive the calls.
        unsafe {
            if le_abi_version() != ABI {
                return Err("another ABI".into());
            }
            check(le_context_create(null(), &mut made.context))?;
            check(le_pool_create(made.context, &options, &mut made.pool))?;
        }
        Ok(made)
    }

    /// An adapter of one module, from safetensors bytes.
    pub fn import(&mut self, bytes: &[u8], scaling: f32) -> Result<i32, String> {
        let mut slot = -1;
        // SAFETY: bytes are as long as is said.
        check(unsafe {
            le_pool_import(self.pool, bytes.as_ptr().cast(), bytes.len(), null(), scaling, &mut slot)
        })?;
        Ok(slot)
    }

    pub fn export(&self, slot: i32, module: &str) -> Result<Vec<u8>, String> {
        let name = CString::new(module).map_err(|error| error.to_string())?;
        let modules = [name.as_ptr()];
        let mut size = 0;
        // SAFETY: the second call is given as many bytes as the first asked for.
        unsafe {
            check(le_pool_export(self.pool, slot, modules.as_ptr(), null_mut(), 0, &mut size))?;
            let mut bytes = vec![0u8; size];
            let to = bytes.as_mut_ptr().cast();
            check(le_pool_export(self.pool, slot, modules.as_ptr(), to, bytes.len(), &mut size))?;
            Ok(bytes)
        }
    }

    pub fn forward(&self, slot: i32, x: &Array, y: &mut Array) -> Result<(), String> {
        // SAFETY: both borrow what they describe.
        check(unsafe { le_pool_forward_slot(self.pool, slot, x, 0, 0, y) })
    }

    /// What became of it, and the gradient's norm.
    pub fn adapt(&self, slot: i32, x: &Array, grad: &Array, step: &Step) -> Result<(u8, f64), String> {
        let (mut outcome, mut norm) = (0, 0.0);
        // SAFETY: as above.
        check(unsafe {
            le_pool_adapt_slot(self.pool, slot, x, grad, step, &mut outcome, &mut norm)
        })?;
        Ok((outcome, norm))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handles; NULL is allowed.
        unsafe {
            le_pool_destroy(self.pool);
            le_context_destroy(self.context);
        }
    }
}
