# What is installed: header, libraries, CMake package, pkg-config file. The folders are
# LORA_ENGINE_INCLUDE_DIR and LORA_ENGINE_LIB_DIR, relative to the prefix, and the whole may move.
include(CMakePackageConfigHelpers)

set(package_dir ${LORA_ENGINE_LIB_DIR}/cmake/lora_engine)
install(TARGETS lora_engine lora_engine_static EXPORT lora_engine
  LIBRARY DESTINATION ${LORA_ENGINE_LIB_DIR}
  ARCHIVE DESTINATION ${LORA_ENGINE_LIB_DIR})
install(DIRECTORY csrc/include/ DESTINATION ${LORA_ENGINE_INCLUDE_DIR})
install(EXPORT lora_engine NAMESPACE lora_engine:: DESTINATION ${package_dir}
  FILE lora_engine-targets.cmake)

configure_package_config_file(cmake/lora_engine-config.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/lora_engine-config.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change the ABI.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/lora_engine-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/lora_engine-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/lora_engine-config-version.cmake
  DESTINATION ${package_dir})

file(RELATIVE_PATH pc_include "/${LORA_ENGINE_LIB_DIR}/pkgconfig" "/${LORA_ENGINE_INCLUDE_DIR}")
configure_file(cmake/lora_engine.pc.in ${CMAKE_CURRENT_BINARY_DIR}/lora_engine.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/lora_engine.pc
  DESTINATION ${LORA_ENGINE_LIB_DIR}/pkgconfig)
