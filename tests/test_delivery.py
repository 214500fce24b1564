"""The C library as a host takes it: from a prefix, and from an installed wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers_files import run_python
from helpers_native import ROOT, build, call, install

import lora_engine as le

PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(host C)
find_package(lora_engine 0.1 REQUIRED)
foreach(which lora_engine static)
  add_executable(with_${which} host.c)
  target_link_libraries(with_${which} lora_engine::${which})
endforeach()
"""
HOST = r"""
#include <lora_engine.h>
#include <stdio.h>

int main(void) {
  float x[3] = {1, 2, 3}, A[3] = {1, 1, 1}, B[2] = {2, -1}, y[2] = {9, 9};
  le_array of_x = {x, {3}, {1}, 1, LE_FLOAT32, 0}, of_A = {A, {1, 3}, {3, 1}, 2, LE_FLOAT32, 0};
  le_array of_B = {B, {2, 1}, {1, 1}, 2, LE_FLOAT32, 0}, of_y = {y, {2}, {1}, 1, LE_FLOAT32, 0};
  le_context *ctx;
  if (le_abi_version() != LE_ABI_VERSION || le_context_create(NULL, &ctx) != LE_OK) return 1;
  le_status status = le_lora_delta(ctx, &of_x, &of_A, &of_B, 0.5f, 0, &of_y);
  le_context_destroy(ctx);
  printf("%s %g %g\n", le_status_string(status), y[0], y[1]);
  return status != LE_OK;
}
"""
SAID = "ok 6 -3\n"
# A thread that loads the library, uses it, closes it, and ends.
PLUGIN = r"""
#include <dlfcn.h>
#include <lora_engine.h>
#include <pthread.h>
#include <stdio.h>

static void *use(void *path) {
  float x[3] = {1, 2, 3}, A[3] = {1, 1, 1}, B[2] = {2, -1}, y[2];
  le_array of_x = {x, {3}, {1}, 1, LE_FLOAT32, 0}, of_A = {A, {1, 3}, {3, 1}, 2, LE_FLOAT32, 0};
  le_array of_B = {B, {2, 1}, {1, 1}, 2, LE_FLOAT32, 0}, of_y = {y, {2}, {1}, 1, LE_FLOAT32, 0};
  void *lib = dlopen(path, RTLD_NOW);
  __typeof__(&le_context_create) create = dlsym(lib, "le_context_create");
  __typeof__(&le_lora_delta) delta = dlsym(lib, "le_lora_delta");
  __typeof__(&le_context_destroy) destroy = dlsym(lib, "le_context_destroy");
  le_context *ctx;
  if (create(NULL, &ctx) || delta(ctx, &of_x, &of_A, &of_B, 0.5f, 0, &of_y)) return NULL;
  destroy(ctx);
  printf("%g %g %d\n", y[0], y[1], dlclose(lib));
  return NULL;
}

int main(int argc, char **argv) {
  pthread_t thread;
  for (int i = 0; i < argc; ++i) {
    pthread_create(&thread, NULL, use, argv[1]);
    pthread_join(thread, NULL);
  }
}
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Built and installed without Python, then moved."""
    folder = tmp_path_factory.mktemp("library")
    moved = folder / "moved here"
    install(folder, "LORA_ENGINE_ISAS=generic", "CMAKE_BUILD_TYPE=Debug").rename(moved)
    shutil.rmtree(folder / "build")
    return moved


@pytest.fixture(scope="module")
def wheel():
    """Where the package that runs these tests has its library."""
    asked = ("--include-dir", "--cmake-dir", "--libs")
    answers = [run_python("-m", "lora_engine", option) for option in asked]
    assert [answer.returncode for answer in answers] == [0, 0, 0]
    return [answer.stdout.removesuffix("\n") for answer in answers]


@pytest.fixture
def host(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "host.c").write_text(HOST)
    return tmp_path


@pytest.mark.parametrize("where", ["prefix", "wheel"])
def test_find_package_in_a_project_of_plain_c(where, host, request):
    found = request.getfixturevalue(where)
    setting = f"CMAKE_PREFIX_PATH={found}" if where == "prefix" else f"lora_engine_DIR={found[1]}"
    built = build(host, host / "build", setting)
    for which in ("lora_engine", "static"):
        assert call(built / f"with_{which}") == SAID
    needs = call("readelf", "-d", built / "with_static")
    assert "liblora_engine" not in needs
    assert "liblora_engine" in call("readelf", "-d", built / "with_lora_engine")


def test_flags_of_the_wheel(wheel, host):
    include, _, libs = wheel
    program = host / "host"
    call("cc", host / "host.c", f"-I{include}", *libs.split(" "), "-o", program)
    assert call(program) == SAID


def test_a_plugin_is_closed_before_its_threads_end(wheel, tmp_path):
    include, cmake, _ = wheel
    (tmp_path / "plugin.c").write_text(PLUGIN)
    program = tmp_path / "plugin"
    call("cc", tmp_path / "plugin.c", f"-I{include}", "-ldl", "-pthread", "-o", program)
    assert call(program, Path(cmake).parents[1] / "liblora_engine.so") == "6 -3 0\n" * 2


@pytest.mark.parametrize("where", ["prefix", "wheel"])
def test_pkg_config(where, host, request):
    if not shutil.which("pkg-config"):
        pytest.skip("pkg-config is not installed")
    found = request.getfixturevalue(where)
    lib = found / "lib" if where == "prefix" else Path(found[1]).parents[1]
    env = {"PKG_CONFIG_PATH": str(lib / "pkgconfig")}
    assert call("pkg-config", "--modversion", "lora_engine", **env) == f"{le.__version__}\n"
    flags = call("sh", "-c", "pkg-config --cflags --libs lora_engine", **env).strip()
    program = host / "host"
    call("sh", "-c", f"cc {host}/host.c {flags} -o {program}")
    assert call(program, LD_LIBRARY_PATH=str(lib)) == SAID
    static = call("pkg-config", "--static", "--libs", "lora_engine", **env)
    assert {"-lstdc++", "-lm"} <= set(static.split())


def test_the_prefix_holds_what_a_distribution_expects(prefix):
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    lib = "lib"
    assert files == {
        "include/lora_engine.h",
        "include/lora_engine.hpp",
        f"{lib}/liblora_engine.a",
        f"{lib}/liblora_engine.so",
        f"{lib}/liblora_engine.so.0",
        f"{lib}/liblora_engine.so.{le.__version__}",
        f"{lib}/pkgconfig/lora_engine.pc",
        *(
            f"{lib}/cmake/lora_engine/lora_engine-{name}.cmake"
            for name in ("config", "config-version", "targets", "targets-debug")
        ),
    }


def declared() -> set[str]:
    """Every function of the header."""
    text = (ROOT / "csrc" / "include" / "lora_engine.h").read_text()
    return set(re.findall(r"^LE_API [^(]*?\b(le_\w+)\(", text, re.MULTILINE))


@pytest.mark.parametrize("where", ["prefix", "wheel"])
def test_exactly_the_header_is_exported(where, request):
    found = request.getfixturevalue(where)
    lib = found / "lib" if where == "prefix" else Path(found[1]).parents[1]
    names = call("nm", "-D", "--defined-only", lib / "liblora_engine.so").split("\n")
    assert {line.split()[-1] for line in names if line} == declared()
    assert len(declared()) > 40


@pytest.mark.parametrize(
    "option", ["-std=c99", "-std=c11", "-x c++ -std=c++11"], ids=["c99", "c11", "c++11"]
)
def test_the_header_alone_is_clean(option):
    header = ROOT / "csrc" / "include" / "lora_engine.h"
    code = f"#include <{header}>\n"
    strict = ["-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror", "-fsyntax-only"]
    if "c++" in option:
        strict.remove("-Wstrict-prototypes")
    language = [] if "c++" in option else ["-x", "c"]
    ran = subprocess.run(
        ["cc", *language, *option.split(), *strict, "-"], input=code, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr


def test_the_locator_asks_what_for(capsys):
    from lora_engine.__main__ import main

    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    assert "expected --include-dir, --cmake-dir or --libs" in capsys.readouterr().err
