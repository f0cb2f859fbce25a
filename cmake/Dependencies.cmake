# Everything that is not libc or torch is linked statically.
find_package(GTest REQUIRED)
find_package(CLI11 REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)

# Headers only: toml++, Highway (its two compiled functions are in src/base/hwy_targets.cpp), xxHash.
find_path(TOMLPP_INCLUDE_DIR toml++/toml.h REQUIRED)
find_path(HIGHWAY_INCLUDE_DIR hwy/highway.h REQUIRED)
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)

if(MEGALODON_SENTENCEPIECE)
  include(SentencePiece)
endif()
