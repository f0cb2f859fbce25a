set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
set(CMAKE_CXX_FLAGS_ASAN
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS")
set(CMAKE_EXE_LINKER_FLAGS_ASAN "-fsanitize=address,undefined")
# With coverage for libFuzzer; fuzz/CMakeLists.txt adds its main().
set(CMAKE_CXX_FLAGS_FUZZ "${CMAKE_CXX_FLAGS_ASAN} -fsanitize=fuzzer-no-link")
set(CMAKE_EXE_LINKER_FLAGS_FUZZ "-fsanitize=address,undefined")
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)

# -fPIC everywhere: programs and libraries then share one precompiled header.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fPIC>)
# Errors with clang alone: g++ 12 gives false alarms where strings are added (its bug 105651).
set(warnings_are_errors "")
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  set(warnings_are_errors ";-Werror")
endif()
add_compile_options(
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wnon-virtual-dtor${warnings_are_errors}>")
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  # The torch wheel is built with g++ and the ABI of clang <= 17 (template mangling of constrained functions).
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fclang-abi-compat=17>)
  find_program(MEGALODON_LLD NAMES ld.lld-19 ld.lld-18 ld.lld)
  if(MEGALODON_LLD)
    add_link_options("--ld-path=${MEGALODON_LLD}")
  endif()
endif()

find_program(MEGALODON_CCACHE ccache)
if(MEGALODON_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${MEGALODON_CCACHE})
  if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-Xclang -fno-pch-timestamp>")
  endif()
endif()
