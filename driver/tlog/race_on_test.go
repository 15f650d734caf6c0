//go:build race

package tlog

const raceEnabled = true
