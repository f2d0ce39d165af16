#include "distributed/topology/environment.h"

#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/support/error_of.h"

namespace drrl {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Variables = std::map<std::string, std::string>;

Environment detect(const Variables& variables) {
  return Environment::detect([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

std::string usage_error(const Variables& variables) {
  return error_of(ErrorKind::kUsage, [&] { detect(variables); });
}

Variables with(Variables base, const Variables& changes) {
  for (const auto& [variable, value] : changes) {
    base[variable] = value;
  }
  return base;
}

const Variables kMpirun = {{"OMPI_COMM_WORLD_RANK", "5"},
                           {"OMPI_COMM_WORLD_SIZE", "8"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                           {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
const Variables kTorchrun = {{"RANK", "3"},
                             {"WORLD_SIZE", "4"},
                             {"LOCAL_RANK", "1"},
                             {"LOCAL_WORLD_SIZE", "2"},
                             {"MASTER_PORT", "29500"},
                             {"MASTER_ADDR", "node0.example"},
                             {"TORCHELASTIC_RUN_ID", "7"}};
const Variables kSrun = {
    {"SLURM_PROCID", "9"}, {"SLURM_STEP_NUM_TASKS", "11"},           {"SLURM_LOCALID", "1"},
    {"SLURM_NODEID", "2"}, {"SLURM_STEP_TASKS_PER_NODE", "4(x2),3"}, {"SLURM_NTASKS", "99"}};

TEST(Environment, IsOneProcessWithoutALauncher) {
  const Environment environment = detect({{"PATH", "/bin"}});
  EXPECT_EQ(environment.launcher, Launcher::kSingle);
  EXPECT_EQ(environment.world_rank, 0);
  EXPECT_EQ(environment.world_size, 1);
  EXPECT_EQ(environment.local_rank, 0);
  EXPECT_EQ(environment.local_size, 1);
  EXPECT_FALSE(environment.master_address);
}

TEST(Environment, ReadsMpirun) {
  const Environment environment = detect(kMpirun);
  EXPECT_EQ(environment.launcher, Launcher::kMpirun);
  EXPECT_EQ(environment.world_rank, 5);
  EXPECT_EQ(environment.world_size, 8);
  EXPECT_EQ(environment.local_rank, 1);
  EXPECT_EQ(environment.local_size, 4);
  EXPECT_FALSE(environment.master_port);
}

TEST(Environment, ReadsTorchrun) {
  const Environment environment = detect(with(
      kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "2"}}));
  EXPECT_EQ(environment.launcher, Launcher::kTorchrun);
  EXPECT_EQ(environment.world_rank, 3);
  EXPECT_EQ(environment.world_size, 4);
  EXPECT_EQ(environment.local_rank, 1);
  EXPECT_EQ(environment.local_size, 2);
  EXPECT_EQ(environment.master_address, "node0.example");
  EXPECT_EQ(environment.master_port, 29500);
  EXPECT_TRUE(environment.agent_store);
  EXPECT_EQ(environment.restart_count, 2);
}

TEST(Environment, ReadsTheVariablesOfTorchrunSetByHand) {
  Variables variables = kTorchrun;
  variables.erase("TORCHELASTIC_RUN_ID");
  variables.erase("LOCAL_WORLD_SIZE");
  const Environment environment = detect(variables);
  EXPECT_EQ(environment.launcher, Launcher::kTorchrun);
  EXPECT_EQ(environment.local_size, 4);
  EXPECT_FALSE(environment.agent_store);
}

TEST(Environment, ReadsSrunWithUnevenNodes) {
  const Environment environment = detect(kSrun);
  EXPECT_EQ(environment.launcher, Launcher::kSrun);
  EXPECT_EQ(environment.world_rank, 9);
  EXPECT_EQ(environment.world_size, 11);
  EXPECT_EQ(environment.local_rank, 1);
  EXPECT_EQ(environment.local_size, 3);
  EXPECT_EQ(detect(with(kSrun, {{"SLURM_NODEID", "1"}, {"SLURM_LOCALID", "3"}})).local_size, 4);
}

TEST(Environment, ABatchScriptWithoutSrunIsOneProcess) {
  EXPECT_EQ(detect({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_LOCALID", "0"}}).launcher,
            Launcher::kSingle);
}

TEST(Environment, TheInnermostLauncherWins) {
  EXPECT_EQ(detect(with(with(kTorchrun, kMpirun), kSrun)).launcher, Launcher::kTorchrun);
  EXPECT_EQ(detect(with(kMpirun, kSrun)).launcher, Launcher::kMpirun);
}

TEST(Environment, TorchVariablesUnderMpirunMustAgree) {
  EXPECT_EQ(detect(with(kMpirun, {{"RANK", "5"}, {"WORLD_SIZE", "8"}})).launcher,
            Launcher::kMpirun);
  EXPECT_THAT(usage_error(with(kMpirun, {{"RANK", "0"}})),
              AllOf(HasSubstr("RANK=0"), HasSubstr("mpirun"), HasSubstr("5")));
  EXPECT_THAT(usage_error(with(kSrun, {{"WORLD_SIZE", "4"}})),
              AllOf(HasSubstr("WORLD_SIZE=4"), HasSubstr("srun")));
}

TEST(Environment, ProcessesOfAnotherMpisLauncherAreRefused) {
  const Variables mpich = {{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"PMI_FD", "7"}},
                  intel = with(mpich, {{"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}});
  for (const Variables& variables : {mpich, intel, with(mpich, {{"SLURM_NTASKS", "2"}})}) {
    EXPECT_THAT(usage_error(variables),
                AllOf(HasSubstr("another MPI's launcher as rank 1 of 2 (PMI_RANK, PMI_SIZE)"),
                      HasSubstr("linked to Open MPI"), HasSubstr("mpirun")));
  }
  EXPECT_THAT(usage_error({{"MV2_COMM_WORLD_RANK", "0"}, {"MV2_COMM_WORLD_SIZE", "4"}}),
              HasSubstr("rank 0 of 4 (MV2_COMM_WORLD_RANK"));
  EXPECT_EQ(detect({{"PMI_RANK", "0"}, {"PMI_SIZE", "1"}}).launcher, Launcher::kSingle);

  // What was set by an outer launcher, or by srun --mpi=pmi2, says no more than the inner one.
  EXPECT_EQ(detect(with(mpich, kMpirun)).launcher, Launcher::kMpirun);
  EXPECT_EQ(detect(with(mpich, kTorchrun)).launcher, Launcher::kTorchrun);
  EXPECT_EQ(detect(with(kSrun, {{"PMI_RANK", "9"}, {"PMI_SIZE", "11"}})).launcher, Launcher::kSrun);
  EXPECT_EQ(detect(with(kSrun, {{"PMI_RANK", "0"}, {"PMI_SIZE", "1"}})).launcher, Launcher::kSrun);
  // MPICH's mpiexec starts one proxy on each node by srun, and its processes below that.
  EXPECT_THAT(
      usage_error(with(
          mpich, {{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_LOCALID", "0"}})),
      HasSubstr("rank 1 of 2 (PMI_RANK"));
}

TEST(Environment, NamesTheBadVariableAndItsValue) {
  EXPECT_THAT(usage_error(with(kMpirun, {{"OMPI_COMM_WORLD_RANK", "8"}})),
              HasSubstr("OMPI_COMM_WORLD_RANK=8"));
  EXPECT_THAT(usage_error(with(kMpirun, {{"OMPI_COMM_WORLD_SIZE", "0"}})),
              HasSubstr("OMPI_COMM_WORLD_SIZE=0"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"RANK", "-1"}})), HasSubstr("RANK=-1"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"RANK", "1x"}})), HasSubstr("RANK='1x'"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"RANK", ""}})), HasSubstr("RANK=''"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"WORLD_SIZE", "99999999999999999999"}})),
              HasSubstr("WORLD_SIZE='99999999999999999999'"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"LOCAL_RANK", "2"}})), HasSubstr("LOCAL_RANK=2"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"LOCAL_WORLD_SIZE", "5"}})),
              HasSubstr("LOCAL_WORLD_SIZE=5"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"MASTER_PORT", "70000"}})),
              HasSubstr("MASTER_PORT=70000"));
  EXPECT_THAT(usage_error(with(kTorchrun, {{"MASTER_ADDR", ""}})), HasSubstr("MASTER_ADDR"));
  EXPECT_THAT(usage_error(with(kSrun, {{"SLURM_STEP_TASKS_PER_NODE", "4(y2)"}})),
              HasSubstr("SLURM_STEP_TASKS_PER_NODE='4(y2)'"));
  EXPECT_THAT(usage_error(with(kSrun, {{"SLURM_NODEID", "3"}})), HasSubstr("SLURM_NODEID=3"));
  EXPECT_THAT(usage_error({{"PMI_SIZE", "two"}}), HasSubstr("PMI_SIZE='two'"));
}

TEST(Environment, NamesTheMissingVariable) {
  for (const char* variable : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}) {
    Variables variables = kTorchrun;
    variables.erase(variable);
    EXPECT_THAT(usage_error(variables), AllOf(HasSubstr("torchrun"), HasSubstr(variable)));
  }
  Variables variables = kMpirun;
  variables.erase("OMPI_COMM_WORLD_LOCAL_SIZE");
  EXPECT_THAT(usage_error(variables), HasSubstr("OMPI_COMM_WORLD_LOCAL_SIZE"));
}

}  // namespace
}  // namespace drrl
