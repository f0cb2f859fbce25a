# The CMake package: find_package(megalodon), then target_link_libraries(x megalodon::model). Headers keep their paths
# below src/ ("ops/cema/cema.h"); tests, kernels and what only they include stay out.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(_package ${CMAKE_INSTALL_LIBDIR}/cmake/megalodon)

get_property(_libraries GLOBAL PROPERTY MEGALODON_LIBRARIES)
foreach(library ${_libraries})
  target_compile_features(${library} PUBLIC cxx_std_20)
endforeach()
install(TARGETS ${_libraries} EXPORT megalodonTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT megalodonTargets NAMESPACE megalodon:: DESTINATION ${_package})
install(DIRECTORY src/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/megalodon FILES_MATCHING PATTERN "*.h"
        PATTERN testing.h EXCLUDE PATTERN kernel.h EXCLUDE PATTERN "*-inl.h" EXCLUDE PATTERN torch_pch.h EXCLUDE
        PATTERN cli EXCLUDE)

if(MEGALODON_SENTENCEPIECE)
  install(FILES $<TARGET_FILE:sentencepiece::sentencepiece> DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
configure_package_config_file(cmake/megalodonConfig.cmake.in megalodonConfig.cmake INSTALL_DESTINATION ${_package}
                              NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(megalodonConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/megalodonConfig.cmake ${PROJECT_BINARY_DIR}/megalodonConfigVersion.cmake
              cmake/LibTorch.cmake DESTINATION ${_package})

if(TARGET megalodon)
  set_target_properties(megalodon PROPERTIES INSTALL_RPATH "${MEGALODON_TORCH}/lib")
  install(TARGETS megalodon RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
