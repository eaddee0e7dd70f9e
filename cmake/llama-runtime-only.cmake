# Read after llama.cpp's project() through CMAKE_PROJECT_llama.cpp_INCLUDE (see the Makefile).

# llama.cpp's "common" library serves its command-line tools. We load libllama and libmtmd only:
# leaving it out saves a third of the compile time.
set(LLAMA_BUILD_COMMON OFF)

# Compilers drop the stores that set up ggml's AMX tiles (ggml-org/llama.cpp #20824, PR #26954): on a
# Xeon with AMX the first quantised matrix product then faults. The AVX-512 kernels serve instead.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
