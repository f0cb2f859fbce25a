# sentencepiece::sentencepiece (encode, decode) and sentencepiece::train (tests only), built by
# scripts/build-sentencepiece. Their protobuf stays out of the program's exported symbols: torch has its own.
set(_prefix ${PROJECT_SOURCE_DIR}/build/deps/sentencepiece)
find_library(PROTOBUF_LITE_LIBRARY NAMES libprotobuf-lite.a)
if(NOT EXISTS ${_prefix}/lib/libsentencepiece.a)
  message(STATUS "building SentencePiece (scripts/build-sentencepiece, about a minute)")
  execute_process(COMMAND ${PROJECT_SOURCE_DIR}/scripts/build-sentencepiece RESULT_VARIABLE _failed)
endif()
if(_failed OR NOT PROTOBUF_LITE_LIBRARY)
  message(FATAL_ERROR "SentencePiece needs libprotobuf-dev, protobuf-compiler and a network, or pass "
                      "-DMEGALODON_SENTENCEPIECE=OFF")
endif()
find_package(Threads REQUIRED)

add_library(sentencepiece::sentencepiece STATIC IMPORTED GLOBAL)
set_target_properties(sentencepiece::sentencepiece PROPERTIES
  IMPORTED_LOCATION ${_prefix}/lib/libsentencepiece.a
  INTERFACE_INCLUDE_DIRECTORIES ${_prefix}/include
  INTERFACE_LINK_LIBRARIES "${PROTOBUF_LITE_LIBRARY};Threads::Threads"
  INTERFACE_LINK_OPTIONS "LINKER:--exclude-libs,libsentencepiece.a:libsentencepiece_train.a:libprotobuf-lite.a")
add_library(sentencepiece::train STATIC IMPORTED GLOBAL)
set_target_properties(sentencepiece::train PROPERTIES
  IMPORTED_LOCATION ${_prefix}/lib/libsentencepiece_train.a
  INTERFACE_LINK_LIBRARIES sentencepiece::sentencepiece)
