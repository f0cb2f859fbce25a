# megalodon_cuda: all CUDA code in one plugin, libmegalodon_cuda.so beside the program, which loads it when a CUDA
# device is asked for (ops/device.h). Needs nvcc, not a GPU, and the CUDA half of torch to link against.
set(CMAKE_CUDA_ARCHITECTURES 90a-real CACHE STRING "GPUs to compile for; 80-real and newer work")
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # CMake 3.25 does not know that nvcc has it
endif()
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
find_package(CUDAToolkit REQUIRED)

add_library(torch_cuda INTERFACE IMPORTED GLOBAL)
target_include_directories(torch_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
# --no-as-needed: torch registers its own CUDA kernels when the library is loaded, no symbol of it need be used.
target_link_libraries(torch_cuda INTERFACE torch::cpu -Wl,--no-as-needed ${MEGALODON_TORCH}/lib/libtorch_cuda.so
                      ${MEGALODON_TORCH}/lib/libc10_cuda.so -Wl,--as-needed)

# megalodon_cuda_plugin(SOURCES ... KERNELS ...): host files with torch headers, and .cu files without.
function(megalodon_cuda_plugin)
  cmake_parse_arguments(ARG "" "" "SOURCES;KERNELS" ${ARGN})
  add_library(megalodon_cuda_kernels OBJECT ${ARG_KERNELS})
  add_library(megalodon_cuda MODULE ${ARG_SOURCES} $<TARGET_OBJECTS:megalodon_cuda_kernels>)
  target_include_directories(megalodon_cuda_kernels PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_include_directories(megalodon_cuda PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_compile_options(megalodon_cuda_kernels PRIVATE -Xcompiler=-Wall,-Wextra)
  set_target_properties(megalodon_cuda_kernels PROPERTIES CUDA_RUNTIME_LIBRARY Shared POSITION_INDEPENDENT_CODE ON)
  # No run path: the program loads torch's CUDA half first, and the CUDA libraries are those that it found.
  set_target_properties(megalodon_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Shared SKIP_BUILD_RPATH ON
                        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_RUNTIME_OUTPUT_DIRECTORY})
  target_link_libraries(megalodon_cuda PRIVATE torch_cuda CUDA::cudart CUDA::cublasLt)
  target_link_options(megalodon_cuda PRIVATE -Wl,--exclude-libs,ALL -Wl,-z,defs)
  megalodon_use_pch(megalodon_cuda)
endfunction()
