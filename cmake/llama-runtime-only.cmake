# llama.cpp's "common" library serves its command-line tools. We load libllama and libmtmd only:
# leaving it out saves a third of the compile time. Read through CMAKE_PROJECT_<name>_INCLUDE.
set(LLAMA_BUILD_COMMON OFF)
