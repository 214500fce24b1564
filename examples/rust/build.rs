// LORA_ENGINE_LIB_DIR: the folder of liblora_engine.so.
fn main() {
    println!("cargo:rerun-if-env-changed=LORA_ENGINE_LIB_DIR");
    if let Ok(folder) = std::env::var("LORA_ENGINE_LIB_DIR") {
        println!("cargo:rustc-link-search=native={folder}");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
